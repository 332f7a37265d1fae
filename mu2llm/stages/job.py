"""What a stage is asked to do: plain values that travel to the workers, and where its state lies."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from mu2llm import artefacts, config, storage, tracking
from mu2llm.artefacts import Identity, open_checkpoint
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.errors import UserError
from mu2llm.green import rules_identity
from mu2llm.records import Checkpoint
from mu2llm.settings.stages import FINDINGS, StageConfig, ValidationConfig

_NOT_OF_THE_VISION = ("language_model", "face", "tokenizer", "small", "lora", "placeholder_aligned", "max_text_tokens")
LOSS = "validation/loss"
SCORE = "less_loss"  # −LOSS: where lower is better, Ray takes a checkpoint without any for the best
STOPPED_FILE = "stopped.json"  # in the state: why a worker gave up, which a retry would not mend
FINISHED_FILE = "finished.json"  # in the state: the checkpoint's description, until the driver publishes it


_OF_OLDER_CHECKPOINTS: dict[str, dict[str, Any]] = {
    "model.vision": {"tower": "m3d", "own": None, "sizes": {}},
    "model.tokenizer": {"gate": "mean", "width": None, "output_scale": "none", "prior": 0, "prior_names": 0},
}
"""What settings were before they could be set: checkpoints without them have these."""


_OF_THE_LANGUAGE_MODEL = ("model.tokenizer.width", "model.tokenizer.output_scale")
"""Settings of a tokenizer that its tensors' shapes check, or that are of what it is put before."""


_NAMES_OF_WEIGHTS = ("model.vision.weights", "model.tokenizer.weights", "model.language_model", "model.text_encoder")


class Watch(BaseModel):
    """Reports on held-out cases while a stage trains, `times` spread evenly over its steps, the last at its end.

    `out` is the URI of a Parquet table for the last reports; `then` names a split whose reports are written beside it,
    at the end, and not measured. `kl` measures how far the policy is from its parent.
    """

    times: int = Field(1, ge=1)
    cases: int | None = Field(None, ge=1)
    split: Literal["validation", "test"] = "validation"
    then: Literal["validation", "test"] | None = None
    kl: bool = False
    out: str | None = None

    def table(self, split: str) -> str:
        """Where the last reports on the watched split, or on the one behind it, lie."""
        out = str(self.out)
        return out if split == self.split else f"{out.removesuffix('.parquet')}.{split}.parquet"

    def steps(self, total: int) -> list[int]:
        """After which optimiser steps of `total`."""
        return sorted({max(1, round(total * (i + 1) / self.times)) for i in range(self.times)})


class Job(BaseModel):
    """A stage as plain values that travel to the workers."""

    stage: Literal["contrastive", "sft", "dpo"]
    experiment: dict[str, Any]
    data: str
    data_checksum: str
    out: str
    parent: str | None = None
    parent_weights: str = Field("", description="digest of the parent's weights")
    spec_hash: str
    rows: int
    judge: str | None = None
    git_commit: str | None = None
    run: str = Field("", description="key of the stage's run in the tracking store")
    shards: str = Field("", description="dpo: URI of the shards that the pairs in `data` were made on")
    corrected: str = Field("", description="dpo: URI of corrected scans that are not among them, or of their features")
    split: str = "train"
    reference: str | None = Field(None, description="dpo: URI of the reference's log-probabilities")
    features: str | None = Field(None, description="URI of the cached vision features that are read in place of voxels")
    watch: Watch | None = Field(None, description="held-out reports while it trains")
    fresh: bool = Field(False, description="what lies at `out`, finished or not, is removed before it starts")

    @property
    def resolved(self) -> Experiment:
        return config.validate(self.experiment)

    @property
    def settings(self) -> StageConfig:
        return getattr(self.resolved, self.stage)

    @property
    def validation(self) -> ValidationConfig | None:
        """How its intermediate checkpoints are validated, if they are."""
        validation = getattr(self.settings, "validation", None)
        return validation if validation and validation.steps and self.settings.workers else None

    @property
    def state(self) -> str:
        return f"{self.out.rstrip('/')}.state"

    @property
    def total_steps(self) -> int:
        """Optimiser steps: `max_steps`, or as many as the epochs hold whole batches (at least one)."""
        settings = self.settings
        return settings.max_steps or max(
            1, int(settings.epochs * self.rows / (settings.batch_size * settings.accumulation))
        )

    @property
    def identity(self) -> Identity:
        """All that decides the result: not workers, progress or how often one saves."""
        experiment, data = self.resolved, self.resolved.data
        vision_alone = _NOT_OF_THE_VISION if self.stage == "contrastive" else ()
        inputs: dict[str, Any] = {
            "stage": self.stage,
            **artefacts.decides(self.stage, self.settings, leave_out=("validation",)),
            **artefacts.decides("model", experiment.model, vision_alone),
            "seed": experiment.seed,
        }
        for key in _NAMES_OF_WEIGHTS:
            if "/" in str(inputs.get(key, "")) and storage.exists(inputs[key]):
                inputs[key] = artefacts.content(inputs[key])  # by what it is, not by where it lies
        if data.shuffle_rows != 1:
            inputs["data.shuffle_rows"] = data.shuffle_rows
        if self.stage == "sft":
            inputs["evaluation.question"] = experiment.evaluation.question
            inputs |= {"data.fraction": data.fraction} if data.fraction != 1 else {}
        if (
            getattr(self.settings, "positives", "") in FINDINGS
            or getattr(self.settings, "alignment", 0) > 0
            or (self.stage == "sft" and experiment.model.tokenizer.prior)
        ):
            inputs["rules"] = rules_identity()  # they read the findings that are trained on
        validation = self.validation
        if validation and validation.publish == "best":
            inputs |= artefacts.decides(f"{self.stage}.validation", validation)
        return Identity.of({**inputs, "data": self.data_checksum, "parent": self.parent_weights})


def new_job(
    stage: Literal["contrastive", "sft", "dpo"],
    shards: Shards,
    out: str,
    experiment: Experiment,
    parent: str | None = None,
    **more: Any,
) -> Job:
    """The job of a stage on the `train` split of shards; a UserError where the inputs do not fit together."""
    if shards.spec.hash != experiment.data.spec.hash:
        raise UserError(
            f"{shards.uri} has spec {shards.spec.title}, preset {experiment.name} expects "
            f"{experiment.data.spec.title}: name the preset that it was ingested with"
        )
    if not shards.count("train"):
        raise UserError(f"{shards.uri} has no rows in split train; ingest more scans or change data.split")
    origin = open_checkpoint(parent) if parent else None
    if stage == "sft" and experiment.model.tokenizer.weights:
        check_tokenizer(open_checkpoint(experiment.model.tokenizer.weights), origin, experiment)
    if origin:
        check_parent(origin, experiment)
    if stage != "contrastive" and experiment.model.tokenizer.prior:
        check_prior(origin, experiment, getattr(experiment, stage))
    values = {
        "stage": stage,
        "experiment": experiment.model_dump(mode="json"),
        "data": shards.uri,
        "data_checksum": shards.checksum,
        "out": storage.absolute(out),  # workers stand in another folder
        "parent": parent and storage.absolute(parent),
        "parent_weights": artefacts.weights_of(origin).weights if origin else "",
        "spec_hash": shards.spec.hash,
        "rows": len(shards.subset("train", experiment.data.fraction if stage == "sft" else 1, experiment.seed)),
        "git_commit": tracking.git_commit(),
    }
    return Job(**{**values, **more})


def check_parent(parent: Checkpoint, experiment: Experiment) -> None:
    """A UserError where a checkpoint to start from has another spec or other sizes than the experiment."""
    parts = {"contrastive": ("vision",), "converted": ("vision", "tokenizer")}.get(
        parent.lineage.stage, ("vision", "tokenizer", "language_model")
    )
    if experiment.model.language_model == "small" and "language_model" in parts:
        parts = (*parts, "small")
    _check_architecture(parent, experiment, parts)


def check_prior(parent: Checkpoint | None, experiment: Experiment, settings: Any) -> None:
    """A UserError where a diagnostic prior has no head that tells findings, or vision would move away under it."""
    wanted = f"model.tokenizer.prior={experiment.model.tokenizer.prior}"
    if parent is None and experiment.model.tokenizer.weights is None:
        raise UserError(f"{wanted} takes its head from a contrastive checkpoint: name one with --init")
    if parent and parent.lineage.stage == "contrastive":
        positives = parent.experiment["contrastive"]["positives"]
        if positives not in FINDINGS:
            raise UserError(
                f"{wanted}: {parent.uri} was trained on {positives}s, its head tells no findings; train one with "
                "contrastive.positives=finding or placed_finding, or set model.tokenizer.prior=0"
            )
    if not settings.freeze_vision or getattr(settings, "thaw_vision", None) is not None:
        raise UserError(
            f"{wanted}: its head reads the vision that it was trained with: set freeze_vision=true (and no thaw_vision)"
        )


def check_tokenizer(origin: Checkpoint, parent: Checkpoint | None, experiment: Experiment) -> None:
    """A UserError where vision and tokenizer cannot be of `origin`: another spec or architecture, or a parent's too."""
    if parent:
        raise UserError(
            f"--init {parent.uri} and model.tokenizer.weights={origin.uri} both bring a vision: give one of them"
        )
    _check_architecture(origin, experiment, ("vision", "tokenizer"), _OF_THE_LANGUAGE_MODEL)


def _check_architecture(
    parent: Checkpoint, experiment: Experiment, parts: Sequence[str], leave_out: Collection[str] = ()
) -> None:
    if parent.lineage.spec_hash != experiment.data.spec.hash:
        raise UserError(
            f"{parent.uri} expects spec {parent.spec_title}, preset {experiment.name} has "
            f"{experiment.data.spec.title}: start from a checkpoint of the same preset"
        )
    ours, theirs = experiment.model.model_dump(mode="json"), parent.experiment["model"]
    found = [each for part in parts for each in _different(f"model.{part}", theirs[part], ours[part])]
    different = [each for each in found if each.split(" ")[0] not in leave_out]
    if different:
        raise UserError(
            f"{parent.uri} is of another architecture than preset {experiment.name}: {'; '.join(different)}; name the "
            "preset that it was trained with, or start from another"
        )


def _different(name: str, theirs: Any, ours: Any) -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        theirs = {**_OF_OLDER_CHECKPOINTS.get(name, {}), **theirs}
        keys = [key for key in ours if key in theirs and key != "weights"]
        return [each for key in keys for each in _different(f"{name}.{key}", theirs[key], ours[key])]
    return [] if theirs == ours else [f"{name} is {theirs} there, {ours} here"]


def finished(job: Job) -> Checkpoint | None:
    """The checkpoint at `out` if this very job made it and is not to start over; a UserError if another one did."""
    if job.fresh or not storage.exists(storage.join(job.out, Checkpoint.FILE)):
        return None
    checkpoint = open_checkpoint(job.out)
    lineage = checkpoint.lineage
    job.identity.check(job.out, f"a {lineage.stage} checkpoint", lineage.identity, lineage.inputs)
    return checkpoint

"""Where Ray Train is known: a stage's loop on workers, resumable, with its checkpoint published.

A stage calls `run` on the driver with a `Job`; each worker calls the stage's `loop(job)`, which builds the
model and its HF `Trainer` and hands it to `train`. Everything a resume needs lies under `<out>.state/`;
when the stage is done, the checkpoint is published at `<out>` and the state goes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
import ray.train
import ray.train.torch
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from pydantic import BaseModel, Field
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed

from mu2llm import config, storage, telemetry, tracking
from mu2llm.cases import Shards, Stream
from mu2llm.config import Experiment, StageConfig, ValidationConfig
from mu2llm.errors import Failure, UserError
from mu2llm.records import Checkpoint, Lineage, Training

if TYPE_CHECKING:
    from mu2llm.stages.held_out import HeldOut

logger = logging.getLogger(__name__)
Progress = Callable[[dict[str, float]], None]
_NOT_OF_THE_RESULT: set[str] = {
    *("workers", "gpus_per_worker", "cpus_per_worker", "max_failures"),
    *("save_steps", "keep_checkpoints", "log_steps", "validation", "gradient_checkpointing"),
}
_OF_THE_SCAN = ("volumes", "vision_features", "chunk_mask", "question_ids", "question_mask")
LOSS = "validation/loss"
LISTEN_S = 0.2  # between two looks of the controller at its workers: until it looks, the next report has to wait
SCORE = "less_loss"  # −LOSS: where lower is better, Ray takes a checkpoint without any for the best
SNAPSHOT_FILE = "train/checkpoint_manager_snapshot.json"  # Ray Train's, below the state
KEPT_SNAPSHOT_FILE = "snapshot.json"  # in the state: the last whole one
FINISHED_FILE = "finished.json"  # in the state: the checkpoint's description, until the driver publishes it
# in every intermediate checkpoint: its description, by which a resume goes on. Not named as a whole checkpoint's is,
# which others would take such a folder for: its weights may be an adapter's alone
INTERMEDIATE_FILE = "mu2llm_intermediate.json"


class Watch(BaseModel):
    """Reports on held-out cases while a stage trains, `times` spread evenly over its steps, the last at its end.

    `out` is the URI of a Parquet table for the last reports; `kl` measures how far the policy is from its parent.
    """

    times: int = Field(1, ge=1)
    cases: int | None = Field(None, ge=1)
    split: Literal["validation", "test"] = "validation"
    kl: bool = False
    out: str | None = None

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
    parent_identity: str = ""
    spec_hash: str
    rows: int
    judge: str | None = None
    git_commit: str | None = None
    run: str = Field("", description="key of the stage's run in the tracking store")
    shards: str = Field("", description="dpo: URI of the shards that the pairs in `data` were made on")
    split: str = "train"
    reference: str | None = Field(None, description="dpo: URI of the reference's log-probabilities")
    features: str | None = Field(None, description="URI of the cached vision features that are read in place of voxels")
    watch: Watch | None = Field(None, description="held-out reports while it trains")

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
    def identity(self) -> str:
        """Digest of all that decides the result: not of workers, progress or how often one saves."""
        settings = self.settings.model_dump(mode="json", exclude=_NOT_OF_THE_RESULT)
        parts = [self.stage, settings, self.experiment["model"], self.experiment["seed"]]
        share = self.experiment["data"]["fraction"]
        parts += [] if share == 1 else [share]
        validation = self.validation
        parts += [validation.steps, validation.cases] if validation and validation.publish == "best" else []
        return config.digest([*parts, self.data_checksum, self.parent_identity])


# glibc would give large freed tensors back and fault them in anew at every step: a fifth of a CPU step's time
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_ARENA_MAX": "1",
}


def job(
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
            f"{shards.uri} has spec {shards.spec.name} ({shards.spec.hash}), preset {experiment.name} expects "
            f"{experiment.data.spec.name} ({experiment.data.spec.hash}): name the preset that it was ingested with"
        )
    if not shards.count("train"):
        raise UserError(f"{shards.uri} has no rows in split train; ingest more scans or change data.split")
    origin = Checkpoint.open(parent) if parent else None
    if origin:
        check_parent(origin, experiment)
    values = {
        "stage": stage,
        "experiment": experiment.model_dump(mode="json"),
        "data": shards.uri,
        "data_checksum": shards.checksum,
        "out": storage.absolute(out),  # workers stand in another folder
        "parent": parent and storage.absolute(parent),
        "parent_identity": origin.lineage.identity if origin else "",
        "spec_hash": shards.spec.hash,
        "rows": len(shards.share("train", experiment.data.fraction, experiment.seed)),
        "git_commit": tracking.git_commit(),
    }
    return Job(**{**values, **more})


def check_parent(parent: Checkpoint, experiment: Experiment) -> None:
    """A UserError where a checkpoint to start from has another spec or other sizes than the experiment."""
    if parent.lineage.spec_hash != experiment.data.spec.hash:
        raise UserError(
            f"{parent.uri} expects spec {parent.lineage.spec_hash}, preset {experiment.name} has "
            f"{experiment.data.spec.name} ({experiment.data.spec.hash}): start from a checkpoint of the same preset"
        )
    ours, theirs = experiment.model.model_dump(mode="json"), parent.experiment["model"]
    parts = {"contrastive": ("vision",), "converted": ("vision", "tokenizer")}.get(
        parent.lineage.stage, ("vision", "tokenizer", "language_model")
    )
    if ours["language_model"] == "small" and "language_model" in parts:
        parts = (*parts, "small")
    different = [name for part in parts for name in _different(f"model.{part}", theirs[part], ours[part])]
    if different:
        raise UserError(
            f"{parent.uri} is of another architecture than preset {experiment.name}: {'; '.join(different)}; name the "
            "preset that it was trained with, or start from another"
        )


def _different(name: str, theirs: Any, ours: Any) -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [key for key in ours if key in theirs and key != "weights"]
        return [each for key in keys for each in _different(f"{name}.{key}", theirs[key], ours[key])]
    return [] if theirs == ours else [f"{name} is {theirs} there, {ours} here"]


def finished(job: Job) -> Checkpoint | None:
    """The checkpoint at `out` if this very job made it; a UserError if another one did."""
    if not storage.exists(storage.join(job.out, Checkpoint.FILE)):
        return None
    checkpoint = Checkpoint.open(job.out)
    if checkpoint.lineage.identity != job.identity:
        raise UserError(
            f"{job.out} holds a {checkpoint.lineage.stage} checkpoint of another configuration or data; "
            "give another --out or delete it"
        )
    return checkpoint


def run(
    job: Job, loop: Callable[[Job, Resume], None], progress: Progress | None = None, held_out: HeldOut | None = None
) -> Checkpoint:
    """Runs a stage to its end, from where an interrupted run of the same job left off.

    `held_out` validates its intermediate checkpoints where the job asks for it.

    Raises UserError where the workers do not fit the cluster, Failure where training failed.
    """
    done = finished(job)
    if done:
        return done
    check(job)
    _drop_other_state(job)
    settings = job.settings
    tracked = _track(job)
    job = job.model_copy(update={"run": tracked.key})
    if settings.workers == 0:
        _run_here(job, loop, tracked, progress)
    else:
        _run_on_workers(job, loop, tracked, progress, held_out if job.validation else None)
    stopped = storage.join(job.state, "stopped.json")
    if storage.exists(stopped):
        told = storage.read_json(stopped)
        tracking.end_stage(tracked, {"why": told["why"]}, "FAILED")
        if told.get("mistake"):
            raise UserError(told["why"])
        raise Failure(f"{job.stage} stopped: {told['why']}; see {stopped}")
    checkpoint = _publish(job, held_out if job.validation else None)
    storage.delete(job.state)
    tracking.end_stage(tracked, {"checkpoint": tracking.place(job.out)})
    return checkpoint


def _track(job: Job) -> tracking.StageRun:
    """The stage's run in the tracking store: a new one, or that of the interrupted run which this one goes on with."""
    path = storage.join(job.state, "run.json")
    key = storage.read_json(path)["key"] if storage.exists(path) else None
    of = {"data": storage.lasting(job.data), "data_checksum": job.data_checksum, "spec": job.spec_hash}
    parent = Checkpoint.open(job.parent) if job.parent else None
    tags = {
        **of,
        "parent": tracking.place(parent.uri) if parent else "",
        "parent_run": (parent.lineage.run or "") if parent else "",
        "judge": job.judge or "",
        "commit": job.git_commit or "",
        "out": tracking.place(job.out),
    }
    run = tracking.start_stage(job.stage, job.experiment, tags, key=key)
    storage.write_json(path, {"key": run.key})
    return run


def _run_here(
    job: Job, loop: Callable[[Job, Resume], None], tracked: tracking.StageRun, progress: Progress | None
) -> None:
    """Without workers this process trains: for debuggers, and for sweeps, whose processes stay warm between trials."""

    def told(numbers: dict[str, float]) -> None:
        _observe(job, tracked, numbers)
        if progress:
            progress({**numbers, "total": job.total_steps})

    token = _here.set(_Here(told))
    try:
        _worker({"job": job.model_dump(), "loop": loop})
    except BaseException as error:  # also the SystemExit by which Ray Tune stops a trial
        tracking.end_stage(tracked, {}, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    finally:
        _here.reset(token)


def _run_on_workers(
    job: Job,
    loop: Callable[[Job, Resume], None],
    tracked: tracking.StageRun,
    progress: Progress | None,
    held_out: HeldOut | None,
) -> None:
    settings = job.settings
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(LISTEN_S))
    filesystem, path = storage.resolve(job.state)
    score: dict[str, Any] = {"checkpoint_score_attribute": SCORE} if held_out else {}

    def measured(numbers: dict[str, float]) -> None:
        tracked.log(numbers, step=int(numbers["step"]))

    followed = held_out.followed(job, measured) if held_out else contextlib.nullcontext()
    with (
        tempfile.TemporaryDirectory() as folder,
        _relay(Path(folder) / "progress.jsonl", job.total_steps, progress),
        followed,
    ):
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"job": job.model_dump(), "loop": loop},
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.workers,  # type: ignore[arg-type]  # (MIN, MAX): elastic
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker=_resources(settings),
            ),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the options of Train V1
                name="train",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints, **score),
                callbacks=[_Reporter(str(Path(folder) / "progress.jsonl"), tracked, job)],  # type: ignore[list-item]
                worker_runtime_env={"env_vars": KEEP_FREED_MEMORY},
            ),
            validation_config=held_out.tasks(job) if held_out else None,  # type: ignore[call-arg]
        )
        _mend_snapshot(job)
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            tracking.end_stage(tracked, {"why": _cause(error)}, "FAILED")
            raise Failure(f"{job.stage} failed: {_cause(error)}; what was trained is kept in {job.state}") from error
        except BaseException:
            tracking.end_stage(tracked, {}, "KILLED")
            raise


def scan_by_scan(progress: Progress | None) -> Callable[[int, int], None] | None:
    """Tells of scans that are encoded before a stage trains, as of steps."""
    return None if progress is None else lambda done, total: progress({"step": done, "total": total})


def check(job: Job) -> None:
    """A UserError where the job cannot be trained as it is asked for, or its workers can never fit the cluster."""
    settings = job.settings
    least, most = _range(settings)
    for workers in range(max(least, 1), most + 1):
        if settings.batch_size % workers:
            raise UserError(f"batch_size {settings.batch_size} is global: it does not divide among {workers} workers")
    if settings.fsdp:
        _check_sharding(job)
    _check_room(settings)


def _range(settings: StageConfig) -> tuple[int, int]:
    """The least and the most workers."""
    return (settings.workers, settings.workers) if isinstance(settings.workers, int) else settings.workers


def _check_sharding(job: Job) -> None:
    """What FSDP does not do: it shards no single numbers, and no rank alone can write reports."""
    least, _ = _range(job.settings)
    reasons = {
        f"it shards over workers, and there may be {least}: ask for 2 or more": least < 2,
        "the contrastive stage trains the vision encoder, which any GPU holds": job.stage == "contrastive",
        "sft.alignment's head has a single number for a bias: set it to 0": getattr(job.settings, "alignment", 0) > 0,
        "a learned temperature is a single number: set model.tokenizer.temperature_mode to fixed or annealed": (
            job.resolved.model.tokenizer.temperature_mode == "learned"
        ),
        "sweeps have rank 0 write reports while it trains, which then holds a part of the model": bool(job.watch),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"{job.stage}.fsdp={job.settings.fsdp}: {reason}, or unset {job.stage}.fsdp")


def _check_room(settings: StageConfig) -> None:
    """A UserError where the cluster will never have room for the least number of workers."""
    need, (least, _) = _resources(settings), _range(settings)
    fit = workers_that_fit(need)
    if least > fit:
        each = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
        raise UserError(
            f"{least} workers of {each}: the cluster's nodes hold {fit} of these; a worker is on one node: "
            "ask for fewer workers, for less each, or join a larger cluster"
        )


def workers_that_fit(need: Mapping[str, float]) -> int:
    """As many as the nodes hold, as the cluster is or, where it scales itself, as it can grow to."""
    nodes = workers_on_nodes(need)
    grown = ray._private.state.state.get_cluster_config()
    if grown is None:
        return nodes
    most = sum(_slots(group.resources, need) * int(_limit(group.max_count)) for group in grown.node_group_configs)
    limits = {name: grown.max_resources[name] for name in need if name in grown.max_resources}
    return max(nodes, min(most, _slots(limits, {name: need[name] for name in limits})))


def workers_on_nodes(need: Mapping[str, float]) -> int:
    """As many as the nodes hold that are there now."""
    return sum(_slots(node["Resources"], need) for node in ray.nodes() if node["Alive"])


def _slots(have: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How often `each` goes into `have`."""
    times = (math.floor(_limit(have.get(name, 0)) / amount + 1e-6) for name, amount in each.items() if amount)
    return min(times, default=sys.maxsize)


def _limit(number: float) -> float:
    return sys.maxsize if number < 0 else number  # Ray's −1: none


def _resources(settings: StageConfig) -> dict[str, float]:
    resources = {"CPU": settings.cpus_per_worker}
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    return resources


def _drop_other_state(job: Job) -> None:
    """What an interrupted run left is used if it was this job, and goes if it was another."""
    marker = storage.join(job.state, "identity.json")
    if storage.exists(marker) and storage.read_json(marker)["identity"] == job.identity:
        storage.delete(storage.join(job.state, "stopped.json"))
        return
    if storage.exists(job.state):
        storage.delete(job.state)
    storage.write_json(marker, {"identity": job.identity, "stage": job.stage})


def _mend_snapshot(job: Job) -> None:
    """Puts back Ray Train's list of checkpoints where a kill left half of it: Ray writes it in place."""
    uri = storage.join(job.state, SNAPSHOT_FILE)
    if not storage.exists(uri) or _is_json(storage.read_bytes(uri)):
        return
    kept = storage.join(job.state, KEPT_SNAPSHOT_FILE)
    if storage.exists(kept):
        storage.write_bytes(uri, storage.read_bytes(kept))
    else:
        logger.warning("%s: its list of checkpoints is broken; %s starts anew", job.state, job.stage)
        storage.delete(storage.parent(uri))


def _keep_snapshot(job: Job) -> None:
    uri = storage.join(job.state, SNAPSHOT_FILE)
    data = storage.read_bytes(uri) if storage.exists(uri) else b""
    if _is_json(data):
        storage.write_bytes(storage.join(job.state, KEPT_SNAPSHOT_FILE), data)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    last = str(next(iter(failures.values())) if failures else error).strip().splitlines()
    return last[-1] if last else type(error).__name__


# ---- controller → driver: one line a report


class _Reporter(ray.train.UserCallback):
    """Runs on the controller: every report goes to the tracking store, to operators, to the driver's progress line."""

    def __init__(self, path: str, run: tracking.StageRun, job: Job) -> None:
        self.path, self.run, self.job = path, run, job

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        numbers = {name: value for name, value in metrics[0].items() if isinstance(value, int | float)}
        with open(self.path, "a") as stream:
            stream.write(json.dumps(numbers) + "\n")
        _observe(self.job, self.run, numbers)
        if checkpoint is not None:
            _keep_snapshot(self.job)


def _observe(job: Job, run: tracking.StageRun, numbers: dict[str, float]) -> None:
    """A report → the tracking store and operators; one that comes with a checkpoint is not measured."""
    if "saved_step" not in numbers:
        run.log(numbers, step=int(numbers.get("step", 0)))
        telemetry.trained(job.stage, run.key, {**numbers, "total": job.total_steps})


@contextlib.contextmanager
def _relay(path: Path, total: int, progress: Progress | None) -> Iterator[None]:
    """Follows the reporter's file and passes each line on to `progress`, while a stage runs."""
    path.touch()
    stop = threading.Event()

    def follow() -> None:
        with path.open() as stream:
            ended = False
            while not ended:
                ended = stop.wait(0.2)  # what was written before the end is still passed on
                for line in stream:
                    if progress:
                        progress({**json.loads(line), "total": total})

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5)


# ---- on the workers


class _OnRayTrain:
    """Where a worker stands among others, and how it reports: Ray Train's."""

    @property
    def rank(self) -> int:
        return int(ray.train.get_context().get_world_rank())

    @property
    def world(self) -> int:
        return int(ray.train.get_context().get_world_size())

    def report(self, metrics: dict[str, Any], folder: Path | None = None, validate: int | None = None) -> None:
        """Metrics, with a folder an intermediate checkpoint; `validate` is its step if it is to be validated."""
        if folder is None:
            ray.train.report(metrics)
            return
        ray.train.report(  # type: ignore[call-arg]  # mypy sees the options of Train V1
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            validation=ray.train.ValidationTaskConfig(fn_kwargs={"step": validate}) if validate else False,
        )

    def preempted(self) -> bool:
        return ray.train.get_preemption_info() is not None

    def checkpoint(self) -> str | None:
        """The last intermediate checkpoint as a local folder."""
        checkpoint = ray.train.get_checkpoint()
        return checkpoint.to_directory(tempfile.mkdtemp(prefix="mu2llm-resume-")) if checkpoint else None


class _Here(_OnRayTrain):
    """The same where the process itself trains: alone, and anew from its start."""

    rank, world = 0, 1  # type: ignore[assignment]

    def __init__(self, told: Progress) -> None:
        self.told = told

    def report(self, metrics: dict[str, Any], folder: Path | None = None, validate: int | None = None) -> None:
        self.told({name: value for name, value in metrics.items() if isinstance(value, int | float)})

    def preempted(self) -> bool:
        return False

    def checkpoint(self) -> str | None:
        return None


_here: ContextVar[_OnRayTrain] = ContextVar("_here", default=_OnRayTrain())  # noqa: B039  it has no state


def _worker(settings: dict[str, Any]) -> None:
    job = Job.model_validate(settings["job"])
    torch.set_num_threads(max(1, int(job.settings.cpus_per_worker)))
    set_seed(job.resolved.seed)
    try:
        settings["loop"](job, Resume.point())
    except UserError as error:
        # not raised on: a retry would end the same way
        storage.write_json(storage.join(job.state, "stopped.json"), {"why": str(error), "mistake": True})


def arguments(job: Job, folder: str, model: Any, **more: Any) -> dict[str, Any]:
    """The HF training arguments that all stages share, as keywords for `TrainingArguments` or `DPOConfig`."""
    settings, world = job.settings, _here.get().world
    return {
        "output_dir": folder,
        "max_steps": job.total_steps,
        "per_device_train_batch_size": settings.batch_size // world,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": settings.schedule,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        "use_cpu": settings.gpus_per_worker == 0,
        "seed": job.resolved.seed,
        "logging_steps": settings.log_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if settings.workers else "no",
        "save_steps": settings.save_steps,
        "ignore_data_skip": True,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "activation_checkpointing": settings.gradient_checkpointing,  # named, as trl's own default is on
        "torch_compile": settings.compile,
        "ddp_find_unused_parameters": False,
        **(sharding(settings.fsdp, model) if settings.fsdp else {}),
        **more,
    }


def sharding(strategy: str, model: Any) -> dict[str, Any]:
    """HF's arguments for FSDP: each layer's weights are gathered when it is reached, those of no layer at once."""
    layers = {type(module).__name__ for module in model.modules()} & set(model._no_split_modules)
    return {
        "fsdp": True,
        "fsdp_config": {
            "reshard_after_forward": strategy == "full_shard",
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP" if layers else "NO_WRAP",
            "transformer_layer_cls_to_wrap": sorted(layers),
        },
    }


class Streamed:
    """Mixed into an HF Trainer: its batches come from `self.batches`, already this rank's, in order.

    A batch is a dict of tensors and the list `case_ids`, which names the cases when the loss is not finite.
    """

    batches: Batches
    first_scan: dict[str, torch.Tensor]
    epochs_a_step: float = 0.0

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.fsdp and PartialState().distributed_type == DistributedType.MULTI_CPU:  # type: ignore[attr-defined]
            # accelerate passes over FSDP there without a word; torch shards over gloo as it does over GPUs
            PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    def get_train_dataloader(self) -> Any:
        return self.batches

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        cases = inputs.pop("case_ids")
        self.first_scan = {name: value[:1] for name, value in inputs.items() if name in _OF_THE_SCAN}
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        finite = torch.isfinite(loss).float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not finite:
            raise _NotFinite.of_all(float(loss), cases)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the loss also how spread the visual tokens' selection is over the last batch's first scan."""
        self.state.epoch = self.state.global_step * self.epochs_a_step  # type: ignore[attr-defined]  # HF: of max_steps
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        if "loss" in logs and hasattr(model, "selection_metrics") and not self.args.fsdp:  # type: ignore[attr-defined]
            logs |= model.selection_metrics(**self._prepare_inputs(self.first_scan))  # type: ignore[attr-defined]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class _NotFinite(Exception):
    def __init__(self, cases: list[str], loss: float) -> None:
        super().__init__(f"the loss is {loss} on cases {', '.join(cases)}")
        self.cases = cases

    @classmethod
    def of_all(cls, loss: float, cases: list[str]) -> _NotFinite:
        """The same on every worker: the cases of those whose loss is not finite."""
        each = [(loss, cases)]
        if torch.distributed.is_initialized():
            each = each * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(each, (loss, cases))
        wrong = [(loss, cases) for loss, cases in each if not math.isfinite(loss)]
        return cls([case for _, cases in wrong for case in cases], wrong[0][0])


class Resume(BaseModel):
    """Where to go on: the last intermediate checkpoint's folder, if there is one, and what was done up to it."""

    folder: str | None = None
    step: int = 0
    seconds: float = 0.0
    cases_seen: int = 0

    @classmethod
    def point(cls) -> Resume:
        folder = _here.get().checkpoint()
        if folder is None:
            return cls()
        done = Training.model_validate(json.loads((Path(folder) / INTERMEDIATE_FILE).read_text())["training"])
        return cls(folder=folder, step=done.steps, seconds=done.seconds, cases_seen=done.cases_seen)


class Batches:
    """What a worker trains on: its share of the stream from where it is to go on, collated."""

    def __init__(
        self,
        job: Job,
        resume: Resume,
        shards: Shards,
        columns: list[str],
        collate: Callable[[Any], dict[str, Any]],
        **more: Any,
    ) -> None:
        here, settings = _here.get(), job.settings
        rows_a_step = settings.batch_size * settings.accumulation
        self.collate = collate
        self.stream = Stream(
            shards,
            job.split,
            columns,
            batch_size=settings.batch_size,
            seed=job.resolved.seed,
            rank=here.rank,
            world=here.world,
            start_row=resume.step * rows_a_step,
            rows=job.total_steps * rows_a_step,
            shuffle_rows=job.resolved.data.shuffle_rows,
            **more,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.collate, self.stream)


def train(
    trainer: Trainer,
    job: Job,
    resume: Resume,
    finish: Callable[[Any, str], dict[str, float]],
    restore: Callable[[str], Any],
) -> None:
    """Trains to the end, reporting and checkpointing on the way, and publishes the checkpoint.

    `finish(model, folder)` writes the final `save_pretrained` folder and returns the stage's own metrics; only rank 0
    calls it. With FSDP no rank has the whole model: `restore` makes it of what HF's trainer saves.
    """
    reports = _Reports(job, resume, trainer.batches.stream)  # type: ignore[attr-defined]  # a Streamed one
    trainer.add_callback(reports)
    trainer.epochs_a_step = job.settings.batch_size * job.settings.accumulation / job.rows  # type: ignore[attr-defined]
    rank = _here.get().rank
    try:
        trainer.train(resume_from_checkpoint=resume.folder)
    except _NotFinite as error:
        # not raised on: the same batch would fail again on every retry
        storage.write_json(storage.join(job.state, "stopped.json"), {"why": str(error), "case_ids": error.cases})
        return
    with tempfile.TemporaryDirectory() as saved, tempfile.TemporaryDirectory() as folder:
        if job.settings.fsdp:
            trainer.save_model(saved)  # on every rank: each holds a part
        if rank == 0:
            model = restore(saved) if job.settings.fsdp else trainer.accelerator.unwrap_model(trainer.model)
            metrics = finish(model, folder)
            progress = reports.progress(trainer.state.global_step)
            storage.copy_folder(folder, job.out)
            # what describes it waits for `_publish`, on the driver, which makes the folder whole
            described = description(job, progress, resume.step, trainer.state, metrics)
            storage.write_json(storage.join(job.state, FINISHED_FILE), described.model_dump(mode="json"))


def history(state: TrainerState) -> list[dict[str, float]]:
    """The numbers that the trainer logged, a dict for each time, over all resumes."""
    return [
        {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
        for entry in state.log_history
    ]


def description(
    job: Job, progress: dict[str, Any], resumed_from: int, state: TrainerState, metrics: dict[str, float]
) -> Checkpoint:
    """What a checkpoint says of itself, between and at the end of the training alike."""
    logged = history(state)
    return Checkpoint(
        uri=job.out,
        experiment=job.experiment,
        lineage=Lineage(
            stage=job.stage,
            data=storage.lasting(job.data),
            data_checksum=job.data_checksum,
            spec_hash=job.spec_hash,
            parent=job.parent and storage.lasting(job.parent),
            judge=job.judge,
            seed=job.resolved.seed,
            git_commit=job.git_commit,
            run=job.run,
            versions=tracking.versions(),
            identity=job.identity,
        ),
        training=Training(
            steps=progress["step"],
            cases_seen=progress["cases_seen"],
            seconds=progress["seconds"],
            resumed_from_step=resumed_from,
            metrics={**dict(item for entry in logged for item in entry.items()), **metrics},
            history=[entry for entry in logged if "loss" in entry],
        ),
    )


def _publish(job: Job, held_out: HeldOut | None) -> Checkpoint:
    """The checkpoint that the workers finished, with what was measured beside them."""
    checkpoint = Checkpoint(uri=job.out, **storage.read_json(storage.join(job.state, FINISHED_FILE)))
    if held_out:
        numbers = held_out.results(job)
        chosen = held_out.publish_best(job) if held_out.settings.publish == "best" else None
        last = next((each for each in numbers if each["step"] == chosen), numbers[-1] if numbers else {})
        metrics = checkpoint.training.metrics | {f"validation/{k}" if k == "step" else k: v for k, v in last.items()}
        training = checkpoint.training.model_copy(update={"validation": numbers, "metrics": metrics})
        checkpoint = checkpoint.model_copy(update={"training": training})
    storage.write_json(storage.join(job.out, Checkpoint.FILE), checkpoint.model_dump(mode="json"))
    return checkpoint


class _Reports(TrainerCallback):
    """HF Trainer → Ray Train: metrics at every log, a checkpoint at every save, one when a node is to go."""

    def __init__(self, job: Job, before: Resume, stream: Stream) -> None:
        self.job, self.before, self.stream = job, before, stream
        self.started = time.monotonic()
        self.saved_on_preemption = False
        self.save_seconds = 0.0

    def progress(self, step: int) -> dict[str, Any]:
        settings = self.job.settings
        rows = (step - self.before.step) * settings.batch_size * settings.accumulation
        return {
            "step": step,
            "seconds": round(self.before.seconds + time.monotonic() - self.started, 3),
            "cases_seen": self.before.cases_seen + rows,
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logged = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        progress = self.progress(state.global_step)
        steps = max(1, state.global_step - self.before.step)
        elapsed = time.monotonic() - self.started
        _here.get().report(
            {
                **logged,
                **progress,
                "samples_per_second": steps * self.job.settings.batch_size * self.job.settings.accumulation / elapsed,
                "workers": _here.get().world,
                "data_wait_share": self.stream.wait_seconds / elapsed,
                "upload_wait_share": self.save_seconds / elapsed,
                "seconds_left": elapsed / steps * (state.max_steps - state.global_step),
            }
        )

    def _validated(self, step: int) -> bool:
        every = self.job.validation.steps if self.job.validation else None
        return every is not None and step % every == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._validated(state.global_step):
            control.should_save = True
        if not self.saved_on_preemption and _here.get().preempted():
            control.should_save = self.saved_on_preemption = True

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if state.is_world_process_zero:
            described = description(self.job, self.progress(state.global_step), self.before.step, state, {})
            (folder / INTERMEDIATE_FILE).write_text(json.dumps(described.model_dump(mode="json")))
        started, step = time.monotonic(), state.global_step
        metrics = {**self.progress(step), "saved_step": step}
        _here.get().report(metrics, folder, validate=step if self._validated(step) else None)
        self.save_seconds += time.monotonic() - started

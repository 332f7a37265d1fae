"""Settings of the training stages and of the preferences between them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mu2llm.settings.inference import InferenceConfig, Precision
from mu2llm.settings.reward import reward_terms
from mu2llm.settings.section import Execution, Section


class LearningRates(Section):
    """By what is trained; None: the stage's `learning_rate`."""

    fresh: float | None = Field(
        None, gt=0, description="what starts from nothing: projector, tokenizer, its maps, and a stage's heads"
    )
    places: float | None = Field(
        None, gt=0, description="where along each axis a text of the contrastive head looks; None: as fresh"
    )
    lora: float | None = Field(None, gt=0, description="adapters of the language model")
    language_model: float | None = Field(None, gt=0, description="the language model itself, or the text encoder")
    vision: float | None = Field(None, gt=0, description="the vision encoder")


class StageConfig(Section):
    """What the three training stages have in common. `batch_size` is global: over all workers."""

    epochs: float = Field(1, gt=0)
    max_steps: int | None = Field(None, ge=1, description="instead of epochs")
    batch_size: int = Field(8, ge=1)
    accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    learning_rates: LearningRates = LearningRates()
    muon: float | None = Field(
        None,
        gt=0,
        description="learning rate of Muon, which then trains the matrices of linear layers, and AdamW the rest: for "
        "what starts from nothing",
    )
    warmup: float = Field(0.05, ge=0, le=1, description="fraction of the steps")
    schedule: str = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: Precision = "fp32"
    save_steps: Execution[int | None] = Field(100, ge=1, description="None: by save_minutes alone")
    save_minutes: Execution[float | None] = Field(None, gt=0, description="save when the last one is so long ago")
    check_steps: Execution[int] = Field(
        5, ge=1, description="every so many steps: is the loss finite, is a node to go, is a save due"
    )
    keep_checkpoints: Execution[int] = Field(1, ge=1)
    log_steps: Execution[int] = Field(10, ge=1)
    workers: Execution[int | tuple[int, int]] = Field(
        1, description="N, or (MIN, MAX) for elastic training; 0 trains in the calling process, without resume"
    )
    gpus_per_worker: Execution[float] = 0
    cpus_per_worker: Execution[float] = 1
    max_failures: Execution[int] = 2
    freeze_vision: bool = False
    gradient_checkpointing: Execution[bool] = Field(
        False, description="compute activations again in the backward pass: less memory, a third more time"
    )
    compile: bool = False
    fsdp: Literal["full_shard", "shard_grad_op"] | None = Field(
        None, description="weights sharded over the workers; shard_grad_op keeps a layer's between forward and backward"
    )

    @model_validator(mode="after")
    def _has_whole_matrices(self) -> Self:
        if self.muon and self.fsdp:
            raise ValueError("muon needs whole matrices, which fsdp parts: leave one of them out")
        return self

    def inference(self, batch_size: int = 16) -> InferenceConfig:
        """For what a parent is asked before the stage trains: an actor gets what a worker gets, and rounds as it."""
        return InferenceConfig(
            precision=self.precision,
            batch_size=batch_size,
            cpus_per_actor=self.cpus_per_worker,
            gpus_per_actor=self.gpus_per_worker,
        )


FINDINGS = ("finding", "placed_finding")
"""The positives that the rules read in reports."""
AUGMENT = "another gain, noise and place in the plane for each scan each time; left stays left"


class ContrastiveConfig(StageConfig):
    loss: Literal["infonce", "sigmoid"] = "sigmoid"
    positives: Literal["report", "section", "sentence", "finding", "placed_finding"] = Field(
        "sentence",
        description="what of a report is held against the scan; finding: what the rules read in it, with its side; "
        "placed_finding: also with its place, such as the lobe",
    )
    augment: bool = Field(False, description=AUGMENT)
    train_text_encoder: bool = Field(False, description="with the vision side; it is then kept in the checkpoint")

    @model_validator(mode="after")
    def _sees_what_is_frozen_once(self) -> Self:
        if self.augment and self.freeze_vision:
            raise ValueError("augment changes voxels, and frozen vision's features are read: unset one of them")
        return self


class ValidationConfig(Section):
    """Validation of checkpoints beside the training, as tasks that wait for free resources of their own."""

    steps: int | None = Field(None, ge=1, description="save and validate every so many steps; None: never")
    cases: int = Field(64, ge=1, description="cases of split validation that the loss is over")
    reports: Execution[int] = Field(16, ge=0, description="of these cases the reports are also written and judged")
    reports_every: Execution[int] = Field(1, ge=1, description="validations from one judging of reports to the next")
    publish: Literal["last", "best"] = Field("last", description="best: the checkpoint of least validation loss")
    cpus: Execution[float] = Field(1, ge=0)
    gpus: Execution[float] = Field(0, ge=0)


class SftConfig(StageConfig):
    freeze_language_model: bool = Field(False, description="train only what reads the scan for it")
    cache_vision: bool = Field(True, description="with vision frozen throughout: encode each scan once")
    thaw_vision: float | None = Field(
        None, ge=0, lt=1, description="fraction of the steps after which frozen vision is trained too"
    )
    group_by_length: bool = Field(False, description="batches of reports of similar lengths, which pad little")
    validation: ValidationConfig = ValidationConfig()
    alignment: float = Field(
        0, ge=0, description="weight of the loss that holds the visual tokens against the report's findings"
    )
    alignment_first: float = Field(
        0, ge=0, lt=1, description="fraction of the steps, at the start, that train by the alignment alone: cheap ones"
    )
    augment: bool = Field(False, description=AUGMENT)
    report_share: float = Field(0.8, ge=0, le=1, description="fraction of reports; the rest are the case's questions")
    too_long: Literal["refuse", "skip", "truncate"] = Field(
        "refuse", description="what becomes of cases whose texts are longer than model.max_text_tokens"
    )

    @model_validator(mode="after")
    def _thaws_what_is_frozen(self) -> Self:
        if self.thaw_vision is not None and not self.freeze_vision:
            raise ValueError("thaw_vision needs freeze_vision")
        if self.augment and self.cached:
            raise ValueError("augment changes voxels, and cache_vision reads features: set sft.cache_vision=false")
        if self.alignment_first and not self.alignment:
            raise ValueError("alignment_first needs alignment above 0: it is all that those steps learn by")
        return self

    @property
    def cached(self) -> bool:
        """Whether vision's features are computed once and trained on."""
        return self.freeze_vision and self.cache_vision and self.thaw_vision is None


class PreferencesConfig(InferenceConfig):
    candidates: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = 256
    min_words: int = 5
    reward: str = Field(
        "green", description="what makes a report better: green, findings, labels, length, format, or a weighted sum"
    )
    margin: float = Field(0.1, ge=0, description="least difference of rewards within a pair; of a sum in z-scores")
    pairs_per_case: int = Field(1, ge=1)
    max_length_ratio: float | None = Field(None, description="drop pairs whose lengths differ by more than this")
    negatives: Literal["sampled", "corrupted"] = "sampled"
    chosen: Literal["sampled", "reference"] = Field(
        "sampled", description="reference: the case's own report is preferred to the worst of the candidates"
    )
    split: Literal["train", "validation"] = "train"
    max_cases: int | None = Field(None, ge=0, description="cases to sample for; 0: pairs from corrections alone")

    @field_validator("reward")
    @classmethod
    def _known(cls, value: str) -> str:
        reward_terms(value)
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.chosen == "reference" and self.negatives == "corrupted":
            raise ValueError("negatives=corrupted has the references among its candidates: leave chosen=sampled")
        return self


# trl's, by its names
DpoLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
    "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip


class DpoConfig(StageConfig):
    beta: float = Field(0.1, gt=0)
    loss: tuple[DpoLoss, ...] = Field(("sigmoid",), min_length=1, description="one or several, also as sigmoid+sft")
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    ld_alpha: float | None = Field(None, ge=0, le=1, description="length desensitising (LD-DPO)")

    @field_validator("loss", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return value.split("+") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _weighted(self) -> Self:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss):
            raise ValueError(f"{len(self.loss_weights)} loss_weights for {len(self.loss)} losses; give one each")
        return self

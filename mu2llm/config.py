"""One experiment: data + model + stages + judge + evaluation + sweep + serving.

Presets are YAML files that override these defaults, `--set a.b=c` overrides a preset, and the resolved
configuration is saved beside every artefact. Unknown keys and wrong values are a UserError of one line.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from importlib.resources import files
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mu2llm.errors import UserError
from mu2llm.records import PreprocessSpec


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class PhantomConfig(Section):
    """The procedural phantoms of `mu2llm phantom` and of the demo."""

    cases: int = Field(800, ge=1)
    prevalence: float = Field(0.2, ge=0.15, le=0.25, description="share of the cases that have a finding")


class DataConfig(Section):
    spec: PreprocessSpec
    split: dict[Literal["train", "validation", "test"], float] = {"train": 0.8, "validation": 0.1, "test": 0.1}
    rejection_budget: float = Field(0.05, ge=0, le=1, description="share of rejected scans over which ingest fails")
    accept: tuple[str, ...] = Field((), description="warning or reason codes that are let in, such as not_hu")
    reconstructions: Literal["one", "all"] = Field("one", description="CT-RATE: one reconstruction a scan, or all")
    shard_mb: int = Field(128, ge=1, description="aimed size of a Parquet shard")
    shuffle_rows: int = Field(1, ge=1, description="neighbouring rows that stay together when an epoch is shuffled")
    fraction: float = Field(
        1, gt=0, le=1, description="share of the training patients, drawn by the seed, that sft and prefer see"
    )
    phantom: PhantomConfig = PhantomConfig()


class VisionConfig(Section):
    """The 3-D vision transformer of each chunk, and the projector behind it (METHOD.md §1.1, §2)."""

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    patch_size: tuple[int, int, int] = (4, 16, 16)
    stem: Literal["linear", "conv"] = "linear"
    class_token: bool = True
    pooling: int = Field(2, description="edge of the cubes of patches that the projector averages")
    projector_layers: int = 2
    standardise: bool = Field(False, description="projected features standardised by running statistics")
    standardise_input: bool = Field(False, description="subtract the running mean scan, voxel by voxel")
    true_grid: bool = Field(True, description="pool cubes of the true patch grid, not of the published default's")
    weights: str | None = Field(None, description="M3D-CLIP's pretrained_ViT.bin or a checkpoint to start from")


class TokenizerConfig(Section):
    """The μ²Tokenizer (METHOD.md §1.2)."""

    num_layers: int = 4
    num_heads: int = 8
    queries: int = Field(256, description="visual tokens that the language model gets")
    top_k: int = 1024
    scales: tuple[int, ...] = (1, 2, 4)
    attention: Literal["absolute", "relative_1d", "relative_3d", "rotary_1d", "rotary_3d"] = "relative_3d"
    selection: Literal["differentiable", "top_k"] = "differentiable"
    temperature: float = Field(1.0, gt=0)
    temperature_mode: Literal["fixed", "learned", "annealed"] = "fixed"
    temperature_end: float = Field(0.1, gt=0, description="where an annealed temperature arrives")
    annealing_steps: int = Field(1000, ge=1, description="training steps that it takes")
    pooling: Literal["dynamic", "static"] = "dynamic"
    residual: bool = Field(True, description="residual, norm and feed-forward in the attention layers")
    mask_padding: bool = Field(True, description="padded chunks and padded text take no part in attention")
    standardise: bool = Field(False, description="final tokens standardised by running statistics")
    text_conditioned: bool = Field(True, description="queries also attend to the question (TTA)")
    positions: bool = Field(True, description="tokens know their chunk and their place in it")
    normalise_scores: bool = Field(True, description="selection scores from normalised tokens: it does not collapse")
    straight_through: bool = Field(True, description="hard top-k lets gradients reach its scores")
    batch_first: bool = Field(True, description="attend over the tokens; the published baseline did over the batch")
    max_positions: int = Field(512, ge=1, description="longest sequence of a 1-D relative position bias")


class SmallLanguageModel(Section):
    """The Llama that is trained from scratch where `model.language_model` is `small`."""

    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 512
    vocabulary: int = 512


class LoraSettings(Section):
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05


# the published implementation, defect by defect (METHOD.md §2.8)
_REFERENCE_FACE: dict[str, Any] = {
    "vision": {"true_grid": False},
    "tokenizer": {
        "attention": "relative_1d",
        "residual": False,
        "mask_padding": False,
        "positions": False,
        "normalise_scores": False,
        "straight_through": False,
    },
    "placeholder_aligned": False,
}


class ModelConfig(Section):
    language_model: str = Field("small", description="small, smollm2, or name or path of any HF causal LM or GGUF")
    text_encoder: str = Field("minilm", description="minilm, small, or name or path of any HF encoder")
    face: Literal["corrected", "reference"] = Field(
        "corrected", description="reference sets every mend of the published code back, where it is not set itself"
    )
    vision: VisionConfig = VisionConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    small: SmallLanguageModel = SmallLanguageModel()
    lora: LoraSettings | None = None
    placeholder_aligned: bool = Field(True, description="visual tokens go where the placeholders are, not to 1…n")
    max_text_tokens: int = 512

    @model_validator(mode="before")
    @classmethod
    def _face(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("face") != "reference":
            return values
        return _merge(_REFERENCE_FACE, values)


class StageConfig(Section):
    """What the three training stages share. `batch_size` is global: over all workers."""

    epochs: float = Field(1, gt=0)
    max_steps: int | None = Field(None, ge=1, description="instead of epochs")
    batch_size: int = Field(8, ge=1)
    accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps")
    schedule: str = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    save_steps: int = Field(100, ge=1)
    keep_checkpoints: int = Field(1, ge=1)
    log_steps: int = Field(10, ge=1)
    workers: int | tuple[int, int] = Field(
        1, description="N, or (MIN, MAX) for elastic training; 0 trains in the calling process, without resume"
    )
    gpus_per_worker: float = 0
    cpus_per_worker: float = 1
    max_failures: int = 2
    freeze_vision: bool = False
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, a third more time"
    )
    compile: bool = False
    fsdp: Literal["full_shard", "shard_grad_op"] | None = Field(
        None, description="weights sharded over the workers; shard_grad_op keeps a layer's between forward and backward"
    )


class ContrastiveConfig(StageConfig):
    loss: Literal["infonce", "sigmoid"] = "sigmoid"
    positives: Literal["report", "section", "sentence", "finding"] = Field(
        "sentence", description="what of a report is held against the scan; finding: what the rules read in it"
    )
    train_text_encoder: bool = Field(False, description="with the vision side; it is then kept in the checkpoint")


class ValidationConfig(Section):
    """Validation of checkpoints beside the training, as tasks that wait for free resources of their own."""

    steps: int | None = Field(None, ge=1, description="save and validate every so many steps; None: never")
    cases: int = Field(64, ge=1, description="cases of split validation that the loss is over")
    reports: int = Field(16, ge=0, description="of these cases the reports are also written and judged")
    reports_every: int = Field(1, ge=1, description="validations from one judging of reports to the next")
    publish: Literal["last", "best"] = Field("last", description="best: the checkpoint of least validation loss")
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)


class SftConfig(StageConfig):
    freeze_language_model: bool = Field(False, description="train only what reads the scan for it")
    cache_vision: bool = Field(True, description="with vision frozen throughout: encode each scan once")
    thaw_vision: float | None = Field(
        None, ge=0, lt=1, description="share of the steps after which frozen vision is trained too"
    )
    group_by_length: bool = Field(False, description="batches of reports of alike lengths, which pad little")
    validation: ValidationConfig = ValidationConfig()
    alignment: float = Field(
        0, ge=0, description="weight of the loss that holds the visual tokens against the report's findings"
    )
    alignment_first: float = Field(
        0, ge=0, lt=1, description="share of the steps, at the start, that train by the alignment alone: cheap ones"
    )
    report_share: float = Field(0.8, ge=0, le=1, description="share of reports; the rest are the case's questions")

    @model_validator(mode="after")
    def _thaws_what_is_frozen(self) -> Self:
        if self.thaw_vision is not None and (not self.freeze_vision or self.fsdp):
            raise ValueError("thaw_vision needs freeze_vision, and does not go with fsdp")
        if self.alignment_first and not self.alignment:
            raise ValueError("alignment_first needs alignment above 0: it is all that those steps learn by")
        if self.thaw_vision is not None and self.alignment and self.workers not in (0, 1):
            raise ValueError("thaw_vision and alignment together go with one worker only")
        return self

    @property
    def cached(self) -> bool:
        """Whether vision's features are made once and trained on."""
        return self.freeze_vision and self.cache_vision and self.thaw_vision is None


class PreferencesConfig(Section):
    candidates: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = 256
    min_words: int = 5
    margin: float = Field(0.1, ge=0, description="least difference of scores within a pair")
    pairs_per_case: int = Field(1, ge=1)
    max_length_ratio: float | None = Field(None, description="drop pairs whose lengths differ by more than this")
    negatives: Literal["sampled", "corrupted"] = "sampled"
    split: Literal["train", "validation"] = "train"
    max_cases: int | None = Field(None, ge=0, description="cases to sample for; 0: pairs from corrections alone")
    batch_size: int = Field(16, ge=1, description="cases that an actor writes at a time")
    actors: int | None = Field(
        None, ge=1, description="that write candidates; None: as many as the cluster has room for"
    )


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


class JudgeConfig(Section):
    name: str = Field("rules", description="rules, hf:NAME_OR_PATH, openai:MODEL@URL or python:MODULE:CLASS")
    batch_size: int = 8
    max_new_tokens: int = 1024
    truncate_words: int | None = Field(None, description="the published cut at 300 words; None judges by section")
    concurrency: int = 8
    requests_per_minute: float | None = None
    cache: str | None = Field(None, description="URI of the cache of a language model's judgements")
    prompt: str | None = Field(None, description="URI of a prompt with {reference} and {candidate}, instead of ours")


class EvaluationConfig(Section):
    batch_size: int = Field(16, ge=1, description="cases that an actor writes at a time")
    max_new_tokens: int = 256
    max_cases: int | None = None
    bootstrap: int = Field(1000, ge=100)
    regions: bool = Field(True, description="also ask the cases' own questions about a region of the body")
    pages: int = Field(10, ge=0, description="cases that the report shows with their scans")
    actors: int = Field(1, ge=1)
    cpus_per_actor: float = 1
    gpus_per_actor: float = 0
    question: str = "Write the radiology report of this CT scan."
    text_encoder: str = Field("minilm", description="encoder of BERTScore")


Objective = Literal["green", "finding_f1", "visual_tokens", "seconds_per_scan", "kl"]


class SweepConfig(Section):
    space: dict[str, Any] = Field({}, description="what is searched, laid over the space that comes with the command")
    trials: int = Field(12, ge=1)
    search: Literal["optuna", "random", "grid"] = "optuna"
    objective: tuple[Objective, ...] = Field(("green",), min_length=1, description="several: their Pareto front")
    first: tuple[dict[str, Any], ...] = Field((), description="known good points, tried after the configuration itself")
    reports: int = Field(4, ge=1, description="times that a trial is measured, the last at its end")
    cases: int | None = Field(None, ge=1, description="validation cases that a measurement reads; None: all")
    scheduler: Literal["asha", "none"] = "asha"
    grace: int = Field(1, ge=1, description="measurements before a trial can be stopped")
    reduction: float = Field(3, gt=1, description="of this many trials at a rung one goes on")
    workers_per_trial: int = Field(
        1, ge=0, description="0: the trial trains itself, in a process kept for the next one"
    )
    gpus_per_trial: float = Field(0, ge=0, description="may be a fraction")
    max_concurrent: int | None = Field(None, ge=1, description="None: as many as the cluster holds")
    max_failures: int = Field(1, ge=0, description="times that a trial whose process died is tried again")
    time_budget_s: float | None = Field(None, gt=0)
    storage: str | None = Field(None, description="Optuna's database; None: optuna.db in a local --out, else in memory")
    final_seeds: int = Field(3, ge=0, description="seeds with which the winner and the default are trained again")
    final_split: Literal["validation", "test"] = Field("test", description="where those two are compared")


class ReplicasConfig(Section):
    """The processes of one deployment of the service: how many, what each gets, how much each takes on."""

    least: int = Field(1, ge=0, description="0: down to none when nobody asks (the scorer only)")
    most: int = Field(1, ge=1)
    waiting: float = Field(2, gt=0, description="requests a replica that autoscaling aims at")
    at_once: int = Field(16, ge=1, description="requests that a replica takes at a time")
    cpus: float = Field(0.5, ge=0)
    gpus: float = Field(0, ge=0)


class ServingConfig(Section):
    """The HTTP service. `state` keeps API keys, reports, jobs and corrections; uploads are deleted after use."""

    state: str = Field("mu2llm-serve", description="URI of what must survive a restart")
    keep_scans: str | None = Field(None, description="URI under which uploaded scans are kept; None keeps none")
    keep_reports_days: float = Field(30, gt=0, description="for how long a report can be corrected by its id")
    authentication: Literal["auto", "on", "off"] = Field(
        "auto", description="API keys; auto: on where the address is not loopback"
    )
    hosts: tuple[str, ...] = Field((), description="further Host names that are answered on loopback")
    allowed_uris: tuple[str, ...] = Field((), description="what {uri} may lie under, such as s3://bucket/scans")
    max_body_mb: int = Field(1024, ge=1)
    max_slices: int = Field(2500, ge=2)
    reading_seconds: float = Field(120, gt=0, description="for decoding and preparing one scan")
    reading_gib: float = Field(8, gt=0, description="memory that decoding one scan may take")
    request_seconds: float = Field(300, gt=0, description="for one whole report; longer ones are jobs")
    max_pairs: int = Field(256, ge=1, description="pairs of one /v1/green request")
    max_batch_size: int = Field(8, ge=1, description="scans and questions that are written at a time")
    max_queued_requests: int = Field(64, ge=1, description="report requests taken on at once; above: 429")
    cached_scans: int = Field(64, ge=0, description="scans whose encoding a generator remembers")
    jobs_at_once: int = Field(2, ge=1)
    job_seconds: float = Field(3600, gt=0, description="for one job")
    registry_seconds: float = Field(10, gt=0, description="how often a registry:// model is looked up")
    drain_seconds: float = Field(60, ge=0, description="that a replica gets to finish what it has begun")
    ingress: ReplicasConfig = ReplicasConfig(at_once=512, waiting=128)
    reader: ReplicasConfig = ReplicasConfig(most=2, at_once=4)
    generator: ReplicasConfig = ReplicasConfig(cpus=1, at_once=64, waiting=16)
    scorer: ReplicasConfig = ReplicasConfig(at_once=32, waiting=8)

    @field_validator("authentication", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class Experiment(Section):
    """Everything that a run is made of. `name` is the preset's."""

    name: str = "custom"
    seed: int = 0
    data: DataConfig
    model: ModelConfig = ModelConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    sft: SftConfig = SftConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    dpo: DpoConfig = DpoConfig()
    judge: JudgeConfig = JudgeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig = SweepConfig()
    serving: ServingConfig = ServingConfig()

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        _, _, *chunk = self.data.spec.shape
        if any(size % patch for size, patch in zip(chunk, self.model.vision.patch_size, strict=True)):
            raise ValueError(
                f"model.vision.patch_size {self.model.vision.patch_size} does not divide the chunk {tuple(chunk)} "
                "of data.spec (slices, height, width)"
            )
        return self


def presets() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in (files("mu2llm") / "presets").iterdir()
        if path.name.endswith(".yaml")
    )


def load(preset: str, overrides: list[str] | None = None) -> Experiment:
    """A preset by name or path of a YAML file, with `a.b=c` overrides applied; a UserError names what is wrong."""
    values = _read_preset(preset)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}: expected KEY=VALUE, such as dpo.beta=0.2")
        _assign(values, key.strip().split("."), yaml.safe_load(text) if text else "")
    return validate(values)


def validate(values: dict[str, Any]) -> Experiment:
    """Plain values → an Experiment; the UserError names the key, what is wrong and the nearest known key."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None


def digest(value: Any) -> str:
    """Twelve hex digits of anything that JSON can hold: what decides whether a stage is to be done again."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _read_preset(preset: str) -> dict[str, Any]:
    if preset.endswith((".yaml", ".yml")):
        try:
            with open(preset) as stream:
                values = yaml.safe_load(stream) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"preset {preset}: {str(error).splitlines()[0]}") from None
    else:
        path = files("mu2llm") / "presets" / f"{preset}.yaml"
        if not path.is_file():
            raise UserError(
                f"preset {preset!r} is not known; there are {', '.join(presets())}, or a path to a .yaml file"
            )
        values = yaml.safe_load(path.read_text())
    base = values.pop("extends", None)
    values.setdefault("name", preset)
    return _merge(_read_preset(base), values) if base else values


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), _known_keys(first["loc"][:-1]), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_known_keys(first['loc'][:-1]))}"
        return f"configuration: {where} is not a key{hint}"
    return f"configuration: {where or 'experiment'}: {first['msg']}, given {first['input']!r:.80}"


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    model: Any = Experiment
    for part in path:
        model = model.model_fields[str(part)].annotation
    return list(getattr(model, "model_fields", {}))

"""What a job needs of a cluster, and what a GPU can do for a preset: computed, from FLOPs counted on the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mu2llm.config import Experiment
from mu2llm.errors import UserError
from mu2llm.memory import USABLE
from mu2llm.settings.inference import InferenceConfig
from mu2llm.settings.stages import StageConfig

if TYPE_CHECKING:
    from mu2llm.model.memory import Memory, Stage
    from mu2llm.model.summary import Summary

UTILISATION = 0.35
"""Share of the peak that training of this kind reaches; measure yours (`samples_per_second` in every run)."""
REPORT_TOKENS = 256
TRAINING: tuple[Stage, ...] = ("contrastive", "sft", "dpo")
STAGES = (*TRAINING, "preferences", "evaluate")
"""Whose memory is counted, by the names of jobs; generate and serve do less than evaluate."""
BY_JOB = {
    "online": ("preferences", "dpo"),
    "pipeline": ("ingest", "contrastive", "sft", "preferences", "dpo", "evaluate"),
}
"""Jobs of several stages, one after the other."""
VARIANTS, REGIONS = 3, 2
"""Texts a case in evaluation: of its own scan, another's and an empty one; and about chest and abdomen."""


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB; dense bf16 peak in TFLOP/s and memory bandwidth in GB/s, from the vendor's data sheet."""

    name: str
    memory_gib: float
    tflops: float
    bandwidth: float


GPUS = (
    Gpu("L4", 24, 121, 300),
    Gpu("A10G", 24, 70, 600),
    Gpu("A100-40", 40, 312, 1555),
    Gpu("A100-80", 80, 312, 2039),
    Gpu("H100", 80, 989, 3350),
)


@dataclass(frozen=True)
class Ask:
    """Processes that a stage must have at once; each is on one node with all of its `resources`."""

    number: int
    resources: dict[str, float]

    def __str__(self) -> str:
        each = " and ".join(f"{amount:g} {name}" for name, amount in self.resources.items() if amount)
        return f"{self.number} × {each}"


def asks(experiment: Experiment, job: str) -> dict[str, Ask]:
    """Stage → what it cannot start without, of each stage of a job."""
    stages = {
        "ingest": Ask(1, {"CPU": 1.0, "GPU": 0.0}),
        "contrastive": _workers(experiment.contrastive),
        "sft": _workers(experiment.sft),
        "preferences": _actor(experiment.preferences),
        "dpo": _workers(experiment.dpo),
        "evaluate": _actor(experiment.evaluation),
        "sweep_tokenizer": _trial(experiment, experiment.sft),
        "sweep_dpo": _trial(experiment, experiment.dpo),
    }
    if job not in {**stages, **BY_JOB}:
        raise UserError(f"job {job!r} is not known; there are {', '.join(sorted({**stages, **BY_JOB}))}")
    return {stage: stages[stage] for stage in BY_JOB.get(job, (job,))}


def _workers(settings: StageConfig) -> Ask:
    least = settings.workers if isinstance(settings.workers, int) else settings.workers[0]
    return Ask(least, {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker})


def _actor(settings: InferenceConfig) -> Ask:
    return Ask(1, {"CPU": settings.cpus_per_actor, "GPU": settings.gpus_per_actor})


def _trial(experiment: Experiment, settings: StageConfig) -> Ask:
    workers = max(experiment.sweep.workers_per_trial, 1)  # 0: the trial is its own worker
    return Ask(workers, {"CPU": settings.cpus_per_worker, "GPU": experiment.sweep.gpus_of(settings) / workers})


def lacks(asked: Mapping[str, Ask], room: Callable[[Mapping[str, float]], int]) -> list[str]:
    """What the nodes do not hold, in words, where `room` says how many processes of such resources they do."""
    held = {stage: room(each.resources) for stage, each in asked.items()}
    return [
        f"{stage} asks for {each}, the nodes hold {held[stage]} of these"
        for stage, each in asked.items()
        if each.number > held[stage]
    ]


def memory(experiment: Experiment) -> dict[str, Memory]:
    """What one worker of each training stage keeps, and one actor that writes reports, by name."""
    return {stage: kept(experiment, stage) for stage in STAGES}


def kept(experiment: Experiment, stage: str) -> Memory:
    """What a worker or an actor of one of `STAGES` keeps."""
    from mu2llm.model.memory import inference_memory, training_memory  # seconds of imports: only where it is counted

    if stage in TRAINING:
        return training_memory(experiment, stage)  # type: ignore[arg-type]
    evaluates, settings = stage == "evaluate", _writes(experiment, stage)
    texts = VARIANTS + REGIONS * experiment.evaluation.regions if evaluates else experiment.preferences.candidates
    sequences = settings.max_sequences or settings.batch_size * texts
    # an evaluation also encodes the scan after its own, with which a case is asked too, and an empty one
    scans = settings.batch_size + 2 * evaluates
    return inference_memory(experiment, scans, sequences, settings.used_precision)


def gpus_each(experiment: Experiment, stage: str) -> float:
    """The GPUs of a worker or an actor of one of `STAGES`."""
    if stage in TRAINING:
        return float(getattr(experiment, stage).gpus_per_worker)
    return _writes(experiment, stage).gpus_per_actor


def mends(stage: str) -> str:
    """What to do where one of `STAGES` does not fit a GPU."""
    from mu2llm.model.memory import MEMORY_MENDS

    if stage in TRAINING:
        return MEMORY_MENDS.format(stage=stage)
    section = "evaluation" if stage == "evaluate" else stage
    return f"set a smaller {section}.batch_size or {section}.max_sequences, or take a larger GPU"


def _writes(experiment: Experiment, stage: str) -> InferenceConfig:
    return experiment.evaluation if stage == "evaluate" else experiment.preferences


def header(experiment: Experiment) -> str:
    """The line of a preset's file that says what it needs: GiB of a worker of each stage."""
    each = ", ".join(f"{name} {kept.peak / 2**30:.1f}" for name, kept in memory(experiment).items())
    return f"# memory of a worker in GiB, computed: {each}"


def summary_of(experiment: Experiment) -> Summary:
    """Shapes, parameters and FLOPs of one scan with a report of `REPORT_TOKENS`."""
    from mu2llm.model.summary import summarise  # seconds of imports: only where a model is counted

    return summarise(experiment.model, experiment.data.spec, text_tokens=REPORT_TOKENS)


@dataclass(frozen=True)
class Capacity:
    """One preset on one GPU. `train` and `write` are cases an hour and a GPU; `needed_gib` is by stage."""

    preset: str
    gpu: str
    needed_gib: dict[str, float]
    fits: bool
    train: float
    write: float


def capacities(experiments: Sequence[Experiment], gpus: Sequence[Gpu] = GPUS) -> list[Capacity]:
    """Presets × GPUs: memory of one worker by stage, cases an hour of SFT, reports an hour."""
    found = []
    for experiment in experiments:
        summary = summary_of(experiment)
        needed = {name: kept.peak / 2**30 for name, kept in memory(experiment).items()}
        forward = sum(summary.flops.values())
        language_bytes = 2 * summary.parameters["language model"]
        for gpu in gpus:
            flops = gpu.tflops * 1e12 * UTILISATION
            # a token reads all weights once for the whole batch: bound by memory, not by arithmetic
            token = language_bytes / (gpu.bandwidth * 1e9) / experiment.evaluation.batch_size
            found.append(
                Capacity(
                    preset=experiment.name,
                    gpu=gpu.name,
                    needed_gib=needed,
                    fits=max(needed.values()) <= USABLE * gpu.memory_gib,
                    train=3600 / (3 * forward / flops),  # backward costs two forwards
                    write=3600 / (forward / flops + REPORT_TOKENS * token),
                )
            )
    return found


def markdown(table: Sequence[Capacity]) -> str:
    """The table of cluster/README.md."""
    gpus = list(dict.fromkeys(each.gpu for each in table))
    stages = STAGES
    lines = [
        f"| preset | {' | '.join(f'{stage}, GiB' for stage in stages)} | {' | '.join(gpus)} |",
        f"|---|{'---|' * (len(stages) + len(gpus))}",
    ]
    for preset in dict.fromkeys(each.preset for each in table):
        row = [each for each in table if each.preset == preset]
        needed = [f"{row[0].needed_gib[stage]:.1f}" for stage in stages]
        cells = [f"{_round(each.train)} / {_round(each.write)}" if each.fits else "does not fit" for each in row]
        lines.append(f"| {preset} | {' | '.join([*needed, *cells])} |")
    return "\n".join(lines)


def _round(value: float) -> str:
    """Two significant digits: it is an estimate."""
    return f"{float(f'{value:.2g}'):,.0f}"

"""What a job needs of a cluster, and what a GPU can do for a preset: computed, from FLOPs counted on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mu2llm.config import Experiment
from mu2llm.errors import UserError
from mu2llm.settings.inference import InferenceConfig
from mu2llm.settings.stages import StageConfig

if TYPE_CHECKING:
    from mu2llm.model.summary import Summary

UTILISATION = 0.35
"""Share of the peak that training of this kind reaches; measure yours (`samples_per_second` in every run)."""
REPORT_TOKENS = 256
TRAINED_BYTES, FROZEN_BYTES = 16, 4
"""A parameter: fp32 weight, gradient and AdamW's two moments; or the fp32 weight alone."""


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


def needs(experiment: Experiment, job: str) -> dict[str, float]:
    """CPUs and GPUs without which a job can never start: the most that any of its stages asks for at once."""
    by_job = {
        "ingest": {"CPU": 1.0, "GPU": 0.0},
        "contrastive": _workers(experiment.contrastive),
        "sft": _workers(experiment.sft),
        "preferences": _actor(experiment.preferences),
        "dpo": _workers(experiment.dpo),
        "evaluate": _actor(experiment.evaluation),
        "sweep_tokenizer": _trial(experiment, experiment.sft),
        "sweep_dpo": _trial(experiment, experiment.dpo),
    }
    whole = [by_job[stage] for stage in ("ingest", "contrastive", "sft", "preferences", "dpo", "evaluate")]
    by_job["pipeline"] = {name: max(each[name] for each in whole) for name in ("CPU", "GPU")}
    if job not in by_job:
        raise UserError(f"job {job!r} is not known; there are {', '.join(sorted(by_job))}")
    return by_job[job]


def _workers(settings: StageConfig) -> dict[str, float]:
    least = settings.workers if isinstance(settings.workers, int) else settings.workers[0]
    return {"CPU": least * settings.cpus_per_worker, "GPU": least * settings.gpus_per_worker}


def _actor(settings: InferenceConfig) -> dict[str, float]:
    return {"CPU": settings.cpus_per_actor, "GPU": settings.gpus_per_actor}


def _trial(experiment: Experiment, settings: StageConfig) -> dict[str, float]:
    workers = max(experiment.sweep.workers_per_trial, 1)  # 0: the trial is its own worker
    return {"CPU": workers * settings.cpus_per_worker, "GPU": experiment.sweep.gpus_per_trial}


def lacks(need: Mapping[str, float], have: Mapping[str, float]) -> list[str]:
    """What of `need` is more than `have`, in words; nothing where it fits."""
    return [
        f"{amount:g} {name} needed, the cluster has {have.get(name, 0):g}"
        for name, amount in need.items()
        if amount > have.get(name, 0)
    ]


def training_gib(experiment: Experiment, stage: str, summary: Summary) -> float:
    """Memory of one worker of `sft` or `dpo`: parameters, gradients, moments, and what a batch's forward keeps.

    At most that much: with sharding (`fsdp`) or recomputation (`gradient_checkpointing`) it is less. DPO's pairs share
    their vision but keep two reports.
    """
    settings: StageConfig = getattr(experiment, stage)
    workers = settings.workers if isinstance(settings.workers, int) else settings.workers[0]
    frozen = {
        "language model": experiment.model.lora is not None or getattr(settings, "freeze_language_model", False),
        "vision": settings.freeze_vision,
    }
    weights = sum(
        count * (FROZEN_BYTES if frozen.get(part) else TRAINED_BYTES) for part, count in summary.parameters.items()
    )
    kept = summary.activation_bytes * (1 if settings.precision == "fp32" else 0.5)
    sequences = 2 if stage == "dpo" else 1
    return (weights + kept * sequences * settings.batch_size / workers) / 2**30


def summary_of(experiment: Experiment) -> Summary:
    """Shapes, parameters and FLOPs of one scan with a report of `REPORT_TOKENS`."""
    from mu2llm.model.summary import summarise  # seconds of imports: only where a model is counted

    return summarise(experiment.model, experiment.data.spec, text_tokens=REPORT_TOKENS)


@dataclass(frozen=True)
class Capacity:
    """One preset on one GPU. `train` and `write` are cases an hour and a GPU."""

    preset: str
    gpu: str
    needed_gib: float
    fits: bool
    train: float
    write: float


def capacities(experiments: Sequence[Experiment], gpus: Sequence[Gpu] = GPUS) -> list[Capacity]:
    """Presets × GPUs: SFT's memory of one worker, cases an hour of SFT, reports an hour."""
    found = []
    for experiment in experiments:
        summary = summary_of(experiment)
        needed = training_gib(experiment, "sft", summary)
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
                    fits=needed <= 0.9 * gpu.memory_gib,
                    train=3600 / (3 * forward / flops),  # backward costs two forwards
                    write=3600 / (forward / flops + REPORT_TOKENS * token),
                )
            )
    return found


def markdown(table: Sequence[Capacity]) -> str:
    """The table of cluster/README.md."""
    gpus = list(dict.fromkeys(each.gpu for each in table))
    lines = [
        f"| preset | SFT, GiB a worker | {' | '.join(gpus)} |",
        f"|---|---|{'---|' * len(gpus)}",
    ]
    for preset in dict.fromkeys(each.preset for each in table):
        row = [each for each in table if each.preset == preset]
        cells = [f"{_round(each.train)} / {_round(each.write)}" if each.fits else "does not fit" for each in row]
        lines.append(f"| {preset} | {row[0].needed_gib:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _round(value: float) -> str:
    """Two significant digits: it is an estimate."""
    return f"{float(f'{value:.2g}'):,.0f}"

"""Intermediate checkpoints measured on held-out cases beside the training, as Ray tasks that it does not wait for.

Ray Train starts a task for each checkpoint that is saved for it. What a task measures lies in
`<out>.state/held_out/<step>.json`; the driver follows it into the tracking store, and it ends up in the published
checkpoint's `training.validation`.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch

from mu2llm import artefacts, storage
from mu2llm.progress import polled
from mu2llm.settings.stages import ValidationConfig
from mu2llm.stages.job import LOSS, SCORE, Job

logger = logging.getLogger(__name__)
LOOK_S = 5  # between two looks at what the tasks have measured
Measure = Callable[[Job, str, bool], dict[str, float]]
Export = Callable[[Job, str, str], None]


@dataclass(frozen=True)
class HeldOut:
    """How a stage does it: `measure(job, folder, reports)` gives the metrics of an intermediate checkpoint's folder,
    `validation/loss` among them and, where `reports` is true, those of what it writes; `export(job, folder, target)`
    makes of one the `save_pretrained` folder that is published."""

    settings: ValidationConfig
    measure: Measure
    export: Export

    def tasks(self, job: Job) -> ray.train.ValidationConfig:
        """What Ray Train does for each checkpoint that is reported with its step."""
        return ray.train.ValidationConfig(
            fn=_Task(job, self.measure, self.settings),
            ray_remote_kwargs={"num_cpus": self.settings.cpus, "num_gpus": self.settings.gpus},
        )

    @contextlib.contextmanager
    def followed(self, job: Job, told: Callable[[dict[str, float]], None]) -> Iterator[None]:
        """Passes on what the tasks measure in the meantime, and warns of those that fail."""
        seen = {entry["step"] for entry in _entries(job)}

        def look() -> None:
            for entry in _entries(job):
                if entry["step"] in seen:
                    continue
                seen.add(entry["step"])
                if "failed" in entry:
                    logger.warning("%s: validation at step %s failed: %s", job.out, entry["step"], entry["failed"])
                else:
                    told(_numbers(entry))

        with polled(look, LOOK_S):
            yield

    def results(self, job: Job) -> list[dict[str, float]]:
        """What was measured so far, by step, also before an interruption."""
        return [_numbers(entry) for entry in _entries(job) if LOSS in entry]

    def publish_best(self, job: Job) -> tuple[int, artefacts.Weights] | None:
        """Replaces what is at `out` by the checkpoint of least loss of those still kept; its step and its weights."""
        for entry in sorted((entry for entry in _entries(job) if LOSS in entry), key=lambda entry: entry[LOSS]):
            uri = storage.join(job.state, "train", entry["checkpoint"])
            if not storage.exists(uri):
                continue
            with storage.local_copy(uri) as folder, tempfile.TemporaryDirectory() as target:
                self.export(job, str(folder), target)
                return int(entry["step"]), artefacts.upload(target, job.out)
        logger.warning("%s: no validated checkpoint is there, so the last one is published, not the best", job.out)
        return None


def _entries(job: Job) -> list[dict[str, Any]]:
    folder = storage.join(job.state, "held_out")
    found = [storage.read_json(storage.join(folder, each.base_name)) for each in storage.list_files(folder)]
    return sorted(found, key=lambda entry: entry["step"])


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if not isinstance(value, str)}


@dataclass(frozen=True)
class _Task:
    job: Job
    measure: Measure
    settings: ValidationConfig

    def __call__(self, checkpoint: ray.train.Checkpoint, **given: Any) -> dict[str, float]:
        """`step` of the checkpoint → its metrics, with the score by which checkpoints are kept."""
        step = int(given["step"])
        torch.set_num_threads(max(1, int(self.settings.cpus)))
        number = step // (self.settings.steps or 1)
        reports = self.settings.reports > 0 and number % self.settings.reports_every == 0
        uri = storage.join(self.job.state, "held_out", f"{step:08d}.json")
        try:
            with checkpoint.as_directory() as folder:
                metrics = self.measure(self.job, folder, reports)
        except Exception as error:
            # `followed` tells it: a checkpoint that cannot be measured is no reason to end a training of days
            storage.write_json(uri, {"step": step, "failed": f"{type(error).__name__}: {error}"})
            raise
        storage.write_json(uri, {"step": step, **metrics, "checkpoint": Path(checkpoint.path).name})
        return {**metrics, SCORE: -metrics[LOSS]}

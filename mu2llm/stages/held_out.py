"""Intermediate checkpoints measured on held-out cases beside the training, as Ray tasks that it does not wait for.

Ray Train starts a task for each checkpoint that is saved for it. What a task measures lies in
`<out>.state/held_out/<step>.json`, goes to the tracking store, and ends up in the published checkpoint's
`training.validation`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch

from mu2llm import storage
from mu2llm.config import ValidationConfig
from mu2llm.stages.runner import LOSS, SCORE, Job
from mu2llm.tracking import StageRun

logger = logging.getLogger(__name__)
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

    def tasks(self, job: Job, run: StageRun) -> ray.train.ValidationConfig:
        """What Ray Train does for each checkpoint that is reported with its step."""
        return ray.train.ValidationConfig(
            fn=_Task(job, self.measure, self.settings, run),
            ray_remote_kwargs={"num_cpus": self.settings.cpus, "num_gpus": self.settings.gpus},
        )

    def results(self, job: Job) -> list[dict[str, Any]]:
        """What was measured so far, by step, also before an interruption; a warning tells what failed."""
        folder = storage.join(job.state, "held_out")
        found = [storage.read_json(storage.join(folder, each.base_name)) for each in storage.list_files(folder)]
        for entry in found:
            if "failed" in entry:
                logger.warning("%s: validation at step %s failed: %s", job.out, entry["step"], entry["failed"])
        return sorted((entry for entry in found if LOSS in entry), key=lambda entry: entry["step"])

    def publish_best(self, job: Job) -> int | None:
        """Replaces what is at `out` by the checkpoint of least loss of those that are still kept; its step."""
        for entry in sorted(self.results(job), key=lambda entry: entry[LOSS]):
            uri = storage.join(job.state, "train", entry["checkpoint"])
            if not storage.exists(uri):
                continue
            with storage.local_copy(uri) as folder, tempfile.TemporaryDirectory() as target:
                self.export(job, str(folder), target)
                storage.copy_folder(target, job.out)
            return int(entry["step"])
        return None


@dataclass(frozen=True)
class _Task:
    job: Job
    measure: Measure
    settings: ValidationConfig
    run: StageRun

    def __call__(self, checkpoint: ray.train.Checkpoint, step: int) -> dict[str, float]:
        torch.set_num_threads(max(1, int(self.settings.cpus)))
        number = step // (self.settings.steps or 1)
        reports = self.settings.reports > 0 and number % self.settings.reports_every == 0
        uri = storage.join(self.job.state, "held_out", f"{step:08d}.json")
        try:
            with checkpoint.as_directory() as folder:
                metrics = self.measure(self.job, folder, reports)
        except Exception as error:
            # told at the end: a checkpoint that cannot be measured is no reason to end a training of days
            storage.write_json(uri, {"step": step, "failed": f"{type(error).__name__}: {error}"})
            raise
        self.run.log(metrics, step)
        storage.write_json(uri, {"step": step, **metrics, "checkpoint": Path(checkpoint.path).name})
        return {**metrics, SCORE: -metrics[LOSS]}

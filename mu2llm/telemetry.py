"""What operators watch while work is done: numbers for Prometheus, through Ray's metrics.

Ray exports them on every node's metrics port under these names with the prefix `ray_`, and counters with the suffix
`_total`. How long checkpoints take to upload, and whatever else is of Ray itself, its own metrics say
(`ray_train_checkpoint_transfer_total_time_s`). cluster/monitoring has a dashboard and alerts for all of them.
"""

from __future__ import annotations

import functools
from collections import Counter as Counts
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

TRAINING = {
    "step": ("mu2llm_train_step", "optimiser steps done, over all resumes"),
    "total": ("mu2llm_train_steps_planned", "optimiser steps that the stage has"),
    "loss": ("mu2llm_train_loss", "training loss, mean since the last log"),
    "samples_per_second": ("mu2llm_train_samples_per_second", "cases trained on a second, over all workers"),
    "data_wait_share": ("mu2llm_train_data_wait_share", "fraction of the time in which training waits for data"),
    "seconds_left": ("mu2llm_train_seconds_left", "seconds to the stage's end at this speed"),
    "cases_seen": ("mu2llm_train_cases_seen", "cases trained on, over all resumes"),
}
"""What a stage reports → (name, meaning) of its gauge."""
INGESTED = ("mu2llm_ingest_cases", "scans that ingest is done with, by result: written or rejected")
REJECTED = ("mu2llm_ingest_rejections", "scans that ingest rejected, by reason")


def trained(stage: str, run: str, numbers: Mapping[str, float]) -> None:
    """Shows a stage's report; `run` is its key in the tracking store."""
    for name, (metric, meaning) in TRAINING.items():
        if name in numbers:
            _gauge(metric, meaning).set(float(numbers[name]), tags={"stage": stage, "run": run})


def ingested(written: int, rejections: list[dict[str, Any]]) -> None:
    """Counts a shard's cases; each rejection has its `reason`."""
    cases = _counter(*INGESTED, "result")
    for result, number in (("written", written), ("rejected", len(rejections))):
        if number:
            cases.inc(number, tags={"result": result})
    for reason, number in Counts(str(each["reason"]) for each in rejections).items():
        _counter(*REJECTED, "reason").inc(number, tags={"reason": reason})


@functools.cache
def _gauge(name: str, meaning: str) -> Gauge:
    return Gauge(name, description=meaning, tag_keys=("stage", "run"))


@functools.cache
def _counter(name: str, meaning: str, tag: str) -> Counter:
    return Counter(name, description=meaning, tag_keys=(tag,))

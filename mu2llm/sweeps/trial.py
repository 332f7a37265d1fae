"""One trial: the stage that the command line calls, with some values changed, watched while it trains.

Its record lies at `<out>/trials/<id>.json` once it has ended; what it leaves besides, at `<out>/trials/<id>/`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, Field

from mu2llm import artefacts, config, storage, tracking
from mu2llm.config import Experiment
from mu2llm.errors import Failure, UserError
from mu2llm.records import Estimate
from mu2llm.stages import dpo, sft
from mu2llm.stages.job import Progress, Watch
from mu2llm.stages.validation import METRICS, PREFIX
from mu2llm.sweeps import pairs
from mu2llm.sweeps.space import Params, apply, canonical

Status = Literal["done", "stopped", "infeasible", "failed"]
DIRECTIONS: dict[str, Literal["min", "max"]] = {
    "green": "max",
    "finding_f1": "max",
    "visual_tokens": "min",
    "seconds_per_scan": "min",
    "kl": "min",
}
REPORTS = "reports.parquet"
_MEMORY = re.compile(r"out of memory|OutOfMemory|MemoryError", re.IGNORECASE)


class Point(BaseModel):
    """What a trial trains: values of the configuration, the seed, and what it trains on and from."""

    params: Params
    seed: int
    data: str
    init: str
    name: str = Field("", description="what a table calls it, where it is not one of a search")
    keep: bool = Field(False, description="keep its checkpoint")


class Plan(BaseModel):
    """What all trials of a sweep share, as plain values that travel to them."""

    stage: Literal["sft", "dpo"]
    experiment: dict[str, Any]
    out: str
    watch: Watch
    identity: str = Field(description="digest of data and configuration")
    store: str | None = None
    parent: tracking.StageRun | None = None
    folder: str = Field(default_factory=os.getcwd, description="where the command runs: Tune moves its processes away")

    @property
    def base(self) -> Experiment:
        return config.validate(self.experiment)

    def id_of(self, point: Point) -> str:
        return artefacts.digest(
            [self.identity, self.watch.model_dump(exclude={"out"}), point.model_dump(exclude={"keep"})]
        )

    def place(self, point: Point) -> str:
        return storage.join(self.out, "trials", self.id_of(point))

    def resolved(self, point: Point) -> Experiment:
        """The trial's own configuration; a UserError where it does not take the values."""
        base = self.base
        settings, sweep = getattr(base, self.stage), base.sweep
        workers = sweep.workers_per_trial
        over = {
            f"{self.stage}.workers": workers,
            f"{self.stage}.gpus_per_worker": sweep.gpus_per_trial / max(workers, 1),
            # of its Train workers; Tune tries again a trial whose own process is lost
            f"{self.stage}.max_failures": sweep.max_failures if workers else 0,
            f"{self.stage}.save_steps": settings.save_steps if workers else 10**9,
        }
        return apply(base, {**over, **point.params, "seed": point.seed})


class Trial(BaseModel):
    """How a trial went. `metrics` are the last ones measured, `history` all of them by step."""

    id: str
    number: int
    point: Point
    status: Status
    why: str = ""
    metrics: dict[str, float] = {}
    history: list[dict[str, float]] = []
    seconds: float = 0.0
    training_seconds: float = 0.0
    overhead_seconds: float = 0.0

    def value(self, name: str) -> float | None:
        return self.metrics.get(name) if self.status in ("done", "stopped") else None

    def estimate(self, name: str) -> Estimate | None:
        """A metric with its interval over patients; without one where it has none."""
        value = self.value(name)
        if value is None:
            return None
        low, high = (self.metrics.get(f"{name}_{end}", value) for end in ("low", "high"))
        return Estimate(value=value, low=low, high=high, n=int(self.metrics.get("n", 0)))

    def write(self, out: str) -> None:
        storage.write_json(storage.join(out, "trials", f"{self.id}.json"), self.model_dump(mode="json"))

    @classmethod
    def read_all(cls, out: str) -> list[Self]:
        """The recorded ones, in the order in which they ended."""
        folder = storage.join(out, "trials")
        names = [info.base_name for info in storage.list_files(folder, recursive=False)]
        found = [
            cls.model_validate(storage.read_json(storage.join(folder, n)))
            for n in names
            if n.endswith(".json") and not n.startswith(".")
        ]
        return sorted(found, key=lambda trial: (trial.number, trial.id))


def run(plan: Plan, point: Point, report: Callable[[dict[str, Any]], None]) -> None:
    """Trains a point and reports its measurements; what goes wrong is reported too, and nothing is raised for it.

    A measurement is a dict of numbers with `step`; the last of a trial that went wrong has `status` and `why`.
    """
    if plan.store:
        os.environ.setdefault("MLFLOW_TRACKING_URI", plan.store)
    if os.path.isdir(plan.folder):
        os.chdir(plan.folder)
    started, measured = time.monotonic(), 0
    place = plan.place(point)
    told: dict[str, float] = {}

    def watched(numbers: dict[str, float]) -> None:
        nonlocal measured
        told.update(numbers)
        found = {n.removeprefix(PREFIX): value for n, value in numbers.items() if n.startswith(PREFIX)}
        if found:
            measured += 1
            report({**found, **_times(started, told), "step": numbers.get("step", 0.0)})

    try:
        experiment = plan.resolved(point)
        with tracking.under(plan.parent):
            metrics = _train(plan, point, experiment, place, watched)
        if not measured:  # it had ended before its driver did
            found = {n.removeprefix(PREFIX): value for n, value in metrics.items() if n.startswith(PREFIX)}
            report({**found, **_times(started, told), "step": metrics.get("step", 0.0)})
    except UserError as error:
        report({"status": "infeasible", "why": str(error)})
    except Exception as error:
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or _MEMORY.search(str(error))
        why = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        report({"status": "infeasible" if memory else "failed", "why": why.strip().splitlines()[0]})
    finally:
        if not point.keep:
            storage.delete(storage.join(place, "checkpoint"))
            storage.delete(storage.join(place, "checkpoint.state"))


def _train(plan: Plan, point: Point, experiment: Experiment, place: str, progress: Progress) -> dict[str, float]:
    """The stage, as `mu2llm train` runs it; its last metrics."""
    out = storage.join(place, "checkpoint")
    watch = plan.watch.model_copy(update={"out": storage.join(place, REPORTS)})
    if plan.stage == "sft":
        return sft.run(point.data, out, experiment, point.init, progress, watch).training.metrics
    data = point.data
    if any(key in point.params for key in pairs.KEYS):
        data = pairs.derived(data, storage.join(plan.out, "pairs"), experiment.preferences)
        pairs.take_reference(pairs.superset(point.data, storage.join(plan.out, "pairs"), experiment.preferences), data)
    return dpo.run(data, out, experiment, point.init, progress, watch).training.metrics


def _times(started: float, told: dict[str, float]) -> dict[str, float]:
    """Seconds since the trial began, and of them those in the training loop."""
    return {"seconds": time.monotonic() - started, "training_seconds": told.get("seconds", 0.0)}


def known(metrics: dict[str, Any]) -> dict[str, float]:
    """What of a Tune result is ours."""
    ends = {f"{name}{end}" for name in METRICS for end in ("_low", "_high")}
    names = {*DIRECTIONS, *ends, "step", "seconds", "training_seconds", "n"}
    return {name: float(value) for name, value in metrics.items() if name in names}


def same(point: Point) -> str:
    """Points with the same text differ in nothing but the seed."""
    return canonical(point.model_dump(exclude={"seed", "keep"}))

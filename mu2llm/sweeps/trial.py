"""One trial: the stage that the command line calls, with some values changed, measured while it trains.

How it went is in the sweep's study (study.py). What it leaves besides, its last reports, lies below the plan's `out`,
at a place that names no folder above: a sweep that was moved finds it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field

from mu2llm import artefacts, config, green, storage, tracking
from mu2llm.artefacts import Identity
from mu2llm.config import Experiment
from mu2llm.engine.predictions import Prediction
from mu2llm.errors import Failure, UserError
from mu2llm.progress import Logged
from mu2llm.records import Estimate
from mu2llm.stages import dpo, sft
from mu2llm.stages.job import Watch
from mu2llm.stages.validation import METRICS, PREFIX
from mu2llm.sweeps import pairs
from mu2llm.sweeps.space import Domain, Params, Space, apply

Status = Literal["done", "stopped", "infeasible", "failed"]
Direction = Literal["minimize", "maximize"]
DIRECTIONS: dict[str, Literal["min", "max"]] = {
    **{"green": "max", "finding_f1": "max", "grounding_gap": "max"},
    **{"visual_tokens": "min", "seconds_per_scan": "min", "kl": "min"},
}
OPTUNA: dict[str, Direction] = {name: "maximize" if end == "max" else "minimize" for name, end in DIRECTIONS.items()}
_MEASURED = {*DIRECTIONS, *(f"{name}_{end}" for name in METRICS for end in ("low", "high"))}
_MEASURED |= {"step", "seconds", "training_seconds", "n"}
_MEMORY = re.compile(r"out of memory|OutOfMemory|MemoryError", re.IGNORECASE)


class Point(BaseModel):
    """What a trial trains. `data` and `init` are those of the plan where empty, else below the plan's `out`."""

    params: Params = {}
    seed: int
    name: str = Field("", description="what a table calls it, where it is not one of a search")
    data: str = ""
    init: str = ""
    keep: bool = Field(False, description="keep its checkpoint")


class Trial(BaseModel):
    """How a trial went. `metrics` are the last ones measured, `history` all of them by step."""

    id: str
    number: int = Field(0, description="its place among those that ended")
    point: Point
    status: Status
    why: str = ""
    metrics: dict[str, float] = {}
    history: list[dict[str, float]] = []
    seconds: float = 0.0
    training_seconds: float = 0.0

    @property
    def overhead_seconds(self) -> float:
        return round(self.seconds - self.training_seconds, 3)

    def value(self, name: str) -> float | None:
        return self.metrics.get(name) if self.status in ("done", "stopped") else None

    def estimate(self, name: str) -> Estimate | None:
        """A metric with its interval over patients; without one where it has none."""
        value = self.value(name)
        if value is None:
            return None
        low, high = (self.metrics.get(f"{name}_{end}", value) for end in ("low", "high"))
        return Estimate(value=value, low=low, high=high, n=int(self.metrics.get("n", 0)))


class Plan(BaseModel):
    """What is searched or trained, over what, from where: plain values that travel to the trials."""

    kind: Literal["tokenizer", "dpo", "ablation"]
    stage: Literal["sft", "dpo"]
    experiment: dict[str, Any]
    domains: dict[str, Domain] = {}
    data: str
    init: str
    shards: str = Field(description="those that the cases lie in")
    checksum: str = Field(description="digest of data and checkpoint")
    out: str
    folder: str = Field("trials", description="of the trials, below `out`")
    watch: Watch
    store: str | None = Field(default_factory=lambda: s if (s := tracking.store()).startswith("sqlite") else None)
    parent: tracking.StageRun | None = None
    cwd: str = Field(default_factory=os.getcwd, description="where the command runs: Tune moves its processes away")

    @property
    def base(self) -> Experiment:
        return config.validate(self.experiment)

    @property
    def space(self) -> Space:
        return Space(self.domains)

    @property
    def pairs(self) -> str:
        """Where the pairs of a search over these lie."""
        return storage.join(self.out, "pairs")

    @property
    def identity(self) -> str:
        """Of what every trial shares; where it is done and how the search goes on are not in it."""
        return Identity.of(self.decides()).digest

    def decides(self) -> dict[str, Any]:
        """Settings and contents that every trial shares: not how work is done, nor what serves or tracks it."""
        base = self.base
        sections = {name: getattr(base, name) for name in ("data", "model", self.stage, "preferences", "evaluation")}
        found = {"stage": self.stage, "seed": base.seed, "data.spec": base.data.spec.hash, "checksum": self.checksum}
        for name, section in sections.items():
            found |= artefacts.decides(name, section, leave_out=("spec", "phantom"))
        return {**found, **green.decides(base.judge)}

    def id_of(self, point: Point) -> str:
        watched = self.watch.model_dump(exclude={"out"} if self.watch.then else {"out", "then"})
        what = [watched, point.model_dump(exclude={"keep"})]
        return artefacts.digest([self.identity, *what])

    def place(self, point: Point, *below: str) -> str:
        return storage.join(self.out, self.folder, self.id_of(point), *below)

    def checkpoint(self, point: Point) -> str:
        return self.place(point, "checkpoint")

    def watched(self, point: Point) -> Watch:
        """What is written of a trial while it trains, and where."""
        return self.watch.model_copy(update={"out": self.place(point, "reports.parquet")})

    def reports(self, point: Point, split: str | None = None) -> list[str]:
        """A trial's last reports on a split (default: the one that is watched), in the order of the cases."""
        table = storage.read_table(self.watched(point).table(split or self.watch.split))
        return [Prediction.from_row(row).text for row in table.to_pylist()]

    def clean(self, point: Point) -> None:
        """Deletes the checkpoint of a trial that has ended, unless it is to be kept."""
        if not point.keep:
            storage.delete(self.checkpoint(point))
            storage.delete(f"{self.checkpoint(point)}.state")

    def inputs(self, point: Point) -> tuple[str, str]:
        """(data, init) of a trial."""
        data, init = (storage.below(self.out, given) if given else "" for given in (point.data, point.init))
        return data or self.data, init or self.init

    def resolved(self, point: Point) -> Experiment:
        """The trial's own configuration; a UserError where it does not take the values."""
        base = self.base
        workers = base.sweep.workers_per_trial
        over = {
            f"{self.stage}.workers": workers,
            f"{self.stage}.gpus_per_worker": base.sweep.gpus_of(getattr(base, self.stage)) / max(workers, 1),
            # of its Train workers; Tune tries again a trial whose own process is lost
            f"{self.stage}.max_failures": base.sweep.max_failures if workers else 0,
            f"{self.stage}.save_steps": getattr(base, self.stage).save_steps if workers else 10**9,
        }
        return apply(base, {**over, **point.params, "seed": point.seed})


def run(plan: Plan, point: Point, report: Callable[[dict[str, Any]], None]) -> None:
    """Trains a point and reports its measurements; what goes wrong is reported too, and nothing is raised for it.

    A measurement is a dict of numbers with `step`; the last of a trial that went wrong has `status` and `why`.
    """
    if plan.store:
        os.environ.setdefault("MLFLOW_TRACKING_URI", plan.store)
    if os.path.isdir(plan.cwd):
        os.chdir(plan.cwd)
    started, measured, training = time.monotonic(), 0, 0.0

    def progress(numbers: dict[str, float]) -> None:
        nonlocal measured, training
        training = numbers.get("seconds", training)
        found = {name.removeprefix(PREFIX): value for name, value in numbers.items() if name.startswith(PREFIX)}
        if found:
            measured += 1
            times = {"seconds": time.monotonic() - started, "training_seconds": training}
            step = numbers.get("step", 0.0)
            report({**found, **times, "step": step, "ended": step >= numbers.get("total", step)})

    try:
        metrics = train(plan, point, progress)
        if not measured:  # it had ended before its driver did
            progress(metrics)
    except UserError as error:
        report({"status": "infeasible", "why": str(error)})
    except Exception as error:
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or is_memory(str(error))
        why = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        report({"status": "infeasible" if memory else "failed", "why": why.strip().splitlines()[0]})
    finally:
        plan.clean(point)


def train(plan: Plan, point: Point, progress: Logged) -> dict[str, float]:
    """The stage, as `mu2llm train` runs it; its last metrics."""
    experiment, (data, init) = plan.resolved(point), plan.inputs(point)
    out, watch = plan.checkpoint(point), plan.watched(point)
    with tracking.under(plan.parent):
        if plan.stage == "sft":
            return sft.run(data, out, experiment, init, progress, watch).training.metrics
        if pairs.searched(point.params):
            data = pairs.part_with_reference(data, plan.pairs, experiment.preferences)
        return dpo.run(data, out, experiment, init, progress, watch).training.metrics


def is_memory(why: str) -> bool:
    return bool(_MEMORY.search(why))


def measurement(result: dict[str, Any]) -> dict[str, float]:
    """What of a Tune result is ours."""
    return {name: float(value) for name, value in result.items() if name in _MEASURED}

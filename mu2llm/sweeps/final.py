"""The winner and the default, each trained anew with several seeds, compared on cases that the search has not seen.

The best of many trials is partly luck. Only a winner that is better here, by a paired bootstrap over patients, is
evaluated in full, and without an evaluation `promote` takes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from mu2llm import storage
from mu2llm.cases import Shards
from mu2llm.engine.predictions import Prediction
from mu2llm.errors import Failure
from mu2llm.evaluation.bootstrap import Bootstrap, Statistic
from mu2llm.evaluation.evaluate import evaluate
from mu2llm.green import load_judge
from mu2llm.records import Estimate
from mu2llm.stages.job import Watch
from mu2llm.stages.validation import METRICS, statistics
from mu2llm.sweeps import results
from mu2llm.sweeps.runner import run_points
from mu2llm.sweeps.trial import REPORTS, Plan, Point, Trial

if TYPE_CHECKING:
    from mu2llm.sweeps.sweep import Sweep

SEEDS_FROM = 100  # beyond those that the search used


class Final(BaseModel):
    """The comparison: each side over its seeds, and winner − default on the same patients."""

    seeds: list[int]
    split: str
    cases: int
    decided_by: str
    winner: dict[str, Estimate | None]
    default: dict[str, Estimate | None]
    difference: dict[str, Estimate | None]
    by_seed: dict[str, dict[str, list[float]]]
    better: bool
    said: str
    checkpoints: list[str]
    evaluation: str | None = None


def compare(
    plan: Plan, best: results.Row, sweep: Sweep, progress: Callable[[int, int, dict[str, float]], None]
) -> Final:
    """Trains both sides and compares them; a Failure where one of them could not be trained."""
    settings, experiment = sweep.experiment.sweep, sweep.experiment
    out = storage.join(sweep.out, "final")
    watch = Watch(times=1, split=settings.final_split, kl=plan.watch.kl)
    plan = plan.model_copy(update={"out": out, "watch": watch})
    seeds = [experiment.seed + SEEDS_FROM + i for i in range(settings.final_seeds)]
    sides = {"winner": best.params, "default": {}}
    points = [
        sweep.start.model_copy(update={"params": params, "seed": seed, "name": name, "keep": True})
        for seed in seeds
        for name, params in sides.items()
    ]
    trials = run_points(plan, points, settings, progress)
    for trial in trials:
        if trial.status != "done":
            raise Failure(f"the {trial.point.name} with seed {trial.point.seed} did not come to its end: {trial.why}")
    if len(trials) < len(points):
        raise Failure(f"{len(points) - len(trials)} final trials were not run in time; --resume goes on")
    return _compared(plan, trials, sweep, seeds)


def _compared(plan: Plan, trials: Sequence[Trial], sweep: Sweep, seeds: list[int]) -> Final:
    experiment = sweep.experiment
    shards = Shards.open(sweep.shards)
    cases = shards.cases(plan.watch.split)
    bootstrap = Bootstrap([case.patient for case in cases], experiment.evaluation.bootstrap, experiment.seed)
    judge = load_judge(experiment.judge)
    sides: dict[str, dict[str, Statistic]] = {}
    by_seed: dict[str, dict[str, list[float]]] = {}
    for name in ("winner", "default"):
        own = [trial for trial in trials if trial.point.name == name]
        found = [statistics(cases, read_reports(plan, trial.point), judge) for trial in own]
        sides[name] = {metric: pooled([each[metric] for each in found]) for metric in METRICS}
        by_seed[name] = {
            metric: [trial.metrics[metric] for trial in own] for metric in own[0].metrics if metric in METRICS
        }
    differences = {m: bootstrap.difference(sides["winner"][m], sides["default"][m]) for m in METRICS}
    decided_by = next((name for name in experiment.sweep.objective if name in METRICS), METRICS[0])
    difference = differences[decided_by]
    better = difference is not None and difference.low > 0
    checkpoints = [storage.join(plan.place(t.point), "checkpoint") for t in trials if t.point.name == "winner"]
    verdict, then = ("is", f"promote {checkpoints[0]}") if better else ("is not", "keep the default")
    by = f"{results.TITLES[decided_by]} {results.cell(difference, signed=True)}"
    said = f"the winner {verdict} better than the default: {by}; {then}"
    final = Final(
        **{"seeds": seeds, "split": plan.watch.split, "cases": len(cases), "decided_by": decided_by},
        **{name: {m: bootstrap.estimate(s) for m, s in side.items()} for name, side in sides.items()},
        **{"difference": differences, "by_seed": by_seed, "better": better, "said": said, "checkpoints": checkpoints},
    )
    if not better:
        return final
    evaluation = storage.join(plan.out, "evaluation")
    evaluate(checkpoints[0], sweep.shards, evaluation, experiment, plan.watch.split)
    return final.model_copy(update={"evaluation": evaluation})


def pooled(statistics: Sequence[Statistic]) -> Statistic:
    """The seeds' statistics of the same cases as one: each case counts with the sum over its seeds."""
    first = statistics[0]
    return Statistic(sum(each.rows for each in statistics), first.metric, first.n)  # type: ignore[arg-type]


def read_reports(plan: Plan, point: Point) -> list[str]:
    """A trial's reports, in the order of the cases."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(plan.place(point), REPORTS))))
    return [Prediction.from_row(row).text for row in table.to_pylist()]

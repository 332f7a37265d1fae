"""The winner and the default, each trained anew with several seeds, compared over seeds and patients.

The best of many trials is partly luck, so both are trained with seeds that the search did not use. Validation decides,
by a paired bootstrap over seeds and patients; the test split reports, and no decision was made on it. Only a winner
that is better is evaluated in full, and without an evaluation `promote` takes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from mu2llm import storage
from mu2llm.cases import Shards
from mu2llm.errors import Failure
from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.evaluation.evaluate import evaluate
from mu2llm.green import Judge, load_judge
from mu2llm.records import Case, Estimate
from mu2llm.stages.job import Watch
from mu2llm.stages.validation import METRICS, statistics
from mu2llm.sweeps.results import TITLES, cell
from mu2llm.sweeps.runner import Ended, run_trials
from mu2llm.sweeps.space import Params
from mu2llm.sweeps.study import Study
from mu2llm.sweeps.trial import Plan, Trial

DECIDES = "validation"
SEEDS_FROM = 100  # beyond those that the search used
Metrics = dict[str, Estimate | None]


class Final(BaseModel):
    """The comparison: each side over its seeds, and winner − default on the same patients, on the split that reports.

    `decision` is the difference on the split that decided.
    """

    seeds: list[int]
    split: str
    cases: int
    decided_by: str
    decided_on: str = DECIDES
    decision: Metrics = {}
    winner: Metrics
    default: Metrics
    difference: Metrics
    by_seed: dict[str, dict[str, list[float]]]
    better: bool
    said: str
    checkpoints: list[str]
    evaluation: str | None = None


def final(plan: Plan, study: Study, best: Params, progress: Ended) -> Final:
    """Trains both sides and compares them; a Failure where one of them could not be trained."""
    base = plan.base
    split, start = base.sweep.final_split, study.start
    watch = Watch(times=1, split=DECIDES, then=split if split != DECIDES else None, kl=plan.watch.kl)
    plan = plan.model_copy(update={"folder": "final/trials", "watch": watch})
    seeds = [base.seed + SEEDS_FROM + i for i in range(base.sweep.final_seeds)]
    sides = {"winner": best, "default": {}}
    points = [
        start.model_copy(update={"params": params, "seed": seed, "name": name, "keep": True})
        for seed in seeds
        for name, params in sides.items()
    ]
    trained = run_trials(plan, study, points, progress)
    for trial in trained:
        if trial.status != "done":
            raise Failure(f"the {trial.point.name} with seed {trial.point.seed} did not come to its end: {trial.why}")
    if len(trained) < len(points):
        raise Failure(f"{len(points) - len(trained)} final trials were not run in time; --resume goes on")
    own = {name: [trial for trial in trained if trial.point.name == name] for name in sides}
    shards = Shards.open(plan.shards)
    found: dict[str, Mapping[str, Metrics]] = {}
    for each in (DECIDES, split):
        cases = shards.cases(each)
        bootstrap = Bootstrap([case.patient for case in cases], base.evaluation.bootstrap, base.seed)
        reports = {name: [plan.reports(trial.point, each) for trial in trials] for name, trials in own.items()}
        found[each] = compare(cases, reports["winner"], reports["default"], load_judge(base.judge), bootstrap)
    compared, decision = found[split], found[DECIDES]["difference"]
    decided_by = next((name for name in base.sweep.objective if name in METRICS), METRICS[0])
    difference = decision[decided_by]
    better = difference is not None and difference.low > 0
    checkpoints = [plan.checkpoint(trial.point) for trial in own["winner"]]
    verdict, then = ("is", f"promote {checkpoints[0]}") if better else ("is not", "keep the default")
    by = f"{TITLES[decided_by]} {cell(difference, signed=True)} on {DECIDES}"
    if split != DECIDES:
        by += f", {cell(compared['difference'][decided_by], signed=True)} on {split}"
    evaluation = storage.join(plan.out, "final", "evaluation") if better else None
    if evaluation:
        evaluate(checkpoints[0], plan.shards, evaluation, base, split)
    return Final(
        **{"seeds": seeds, "split": split, "cases": len(cases), "decided_by": decided_by, "better": better, **compared},
        decision=decision,
        **{"said": f"the winner {verdict} better than the default: {by}; {then}", "checkpoints": checkpoints},
        **{"by_seed": {name: _by_seed(trials) for name, trials in own.items()}, "evaluation": evaluation},
    )


def compare(
    cases: list[Case], winner: Sequence[list[str]], default: Sequence[list[str]], judge: Judge, bootstrap: Bootstrap
) -> Mapping[str, Metrics]:
    """Reports of the same cases, a list a seed → `METRICS` of both sides over their seeds, and their difference.

    Intervals are over seeds and patients; the sides are paired by seed.
    """
    sides = []
    for seeds in (winner, default):
        found = [statistics(cases, reports, judge) for reports in seeds]
        sides.append({name: [each[name] for each in found] for name in METRICS})
    ours, theirs = sides
    return {
        "winner": {name: bootstrap.over_seeds(ours[name]) for name in METRICS},
        "default": {name: bootstrap.over_seeds(theirs[name]) for name in METRICS},
        "difference": {name: bootstrap.difference_over_seeds(ours[name], theirs[name]) for name in METRICS},
    }


def _by_seed(trials: Sequence[Trial]) -> dict[str, list[float]]:
    return {name: [trial.metrics[name] for trial in trials] for name in METRICS if name in trials[0].metrics}

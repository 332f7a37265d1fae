"""The one place that knows Ray Tune: points → trials, as many at once as the cluster holds, each recorded as it ends.

What is to go on is in the study (study.py): Tune asks it for points and tells it how they went, and Tune's own state
is thrown away. Tune's OptunaSearch is not used: what it does not offer in public (which trial is recorded how, what
was interrupted, several objectives with a trial that gave no value) is most of what a study here is asked.
A trial is a thin driver of its stage's Ray Train run, or with `workers_per_trial: 0` trains by itself in a process
that is kept for the next trial, which saves the seconds that a new one needs for its imports.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune
from ray.tune.callback import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from mu2llm.errors import UserError
from mu2llm.settings.stages import StageConfig
from mu2llm.settings.sweeps import SweepConfig
from mu2llm.stages.placement import UNKNOWN, workers_on_nodes, workers_that_fit
from mu2llm.stages.validation import METRICS
from mu2llm.sweeps.study import Study
from mu2llm.sweeps.trial import DIRECTIONS, Plan, Point, Trial, is_memory, measurement, run

Ended = Callable[[float, float, dict[str, float]], None]
"""(trials that ended, of how many, the last one's metrics)"""
DRIVER = {"memory": 1.0}  # of a trial whose workers do the work: a fraction of a CPU would be missing to these
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, not this search alone
    "RAY_AIR_NEW_OUTPUT": "0",
    # an early report of a trial that went wrong has no numbers; recorded as it is
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


def concurrency(settings: StageConfig, sweep: SweepConfig) -> int:
    """Trials that run at once; a UserError where the cluster holds none, or where trials would shard their model.

    Tune does not reserve what a trial's Train workers need, so more at once than fit would wait for each other for
    ever. A worker must fit a node. Of a cluster that grows to what it does not tell, trials that are one process, which
    Tune reserves, ask for what they need; of others there are `sweep.max_concurrent`, or as many as fit its nodes now.
    """
    if settings.fsdp:
        raise UserError(
            f"fsdp={settings.fsdp}: a trial writes reports on rank 0 while it trains, which would then hold a part of "
            "the model: sweep with it unset"
        )
    workers = max(sweep.workers_per_trial, 1)
    each = {"CPU": settings.cpus_per_worker, "GPU": sweep.gpus_of(settings) / workers}
    slots = workers_that_fit(each)
    if slots == UNKNOWN and sweep.workers_per_trial:
        slots = workers * (sweep.max_concurrent or max(1, workers_on_nodes(each) // workers))
    if slots < workers:
        needs = " and ".join(f"{amount:g} {name}" for name, amount in each.items() if amount)
        raise UserError(
            f"a trial needs {workers} × {needs}, and the cluster's nodes hold {slots} of these at once: lower "
            "--workers-per-trial or --gpus-per-trial, or join a larger cluster"
        )
    return min(slots // workers, sweep.max_concurrent or slots)


def run_trials(
    plan: Plan, study: Study, points: Sequence[Point], progress: Ended, wanted: int | None = None
) -> list[Trial]:
    """Trains what the study proposes, `points` first, until there are `wanted` trials; all that there are.

    Without `wanted` the points alone, to their end; their trials, in their order. What is recorded is not run again,
    what was interrupted comes first.
    """
    study.go_on(plan.base.sweep, points)
    before = len(study.trials())
    left = len(study.first) if wanted is None else wanted - before
    if left > 0:
        _tune(plan, study, left, wanted is None, lambda n, last: progress(before + n, before + left, last))
    trials = study.trials()
    if wanted is not None:
        return trials
    return [trial for point in points for trial in trials if trial.point == point]


def _tune(
    plan: Plan, study: Study, left: int, to_the_end: bool, progress: Callable[[int, dict[str, float]], None]
) -> None:
    base = plan.base
    sweep, settings = base.sweep, getattr(base, plan.stage)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    gpus = {"GPU": sweep.gpus_of(settings)} if sweep.gpus_of(settings) else {}
    alone = {"CPU": settings.cpus_per_worker, **gpus}
    with tempfile.TemporaryDirectory(prefix="mu2llm-tune-", ignore_cleanup_errors=True) as folder:
        tune.Tuner(
            tune.with_resources(_trainable(plan), DRIVER if sweep.workers_per_trial else alone),
            tune_config=tune.TuneConfig(
                search_alg=_Proposals(study),
                scheduler=FIFOScheduler() if to_the_end else scheduler(sweep),
                num_samples=left,
                max_concurrent_trials=min(concurrency(settings, sweep), left),
                time_budget_s=sweep.time_budget_s,
                reuse_actors=sweep.workers_per_trial == 0,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                callbacks=[_Recorder(plan, study, to_the_end, progress)],
            ),
        ).fit()


def _trainable(plan: Plan) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        # how long Tune waits for a stopped trial to let go of its process before it gives that to the next one
        os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")
        run(plan, Point.model_validate(config["point"]), tune.report)

    return trial


def scheduler(sweep: SweepConfig) -> TrialScheduler:
    """ASHA by the first objective that training improves; the last measurement ends a trial by itself."""
    rung = next((name for name in sweep.objective if name in METRICS), None)
    most = sweep.reports - 1
    if sweep.scheduler == "none" or rung is None or most < sweep.grace:
        return FIFOScheduler()
    return ASHAScheduler(
        metric=rung,
        mode=DIRECTIONS[rung],
        max_t=most,
        grace_period=sweep.grace,
        reduction_factor=sweep.reduction,
        stop_last_trials=False,
    )


class _Proposals(Searcher):
    """The study as Tune asks it. How a trial went, `_Recorder` tells the study."""

    def __init__(self, study: Study) -> None:
        super().__init__()
        self.study = study

    def suggest(self, trial_id: str) -> dict[str, Any]:
        return {"point": self.study.propose(trial_id).model_dump()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its searcher and its callbacks; nothing is read from there


class _Recorder(Callback):
    """Runs beside Tune on the driver: what a trial measured, and its record as soon as it has ended."""

    def __init__(
        self, plan: Plan, study: Study, to_the_end: bool, progress: Callable[[int, dict[str, float]], None]
    ) -> None:
        self.plan, self.study, self.to_the_end, self.progress = plan, study, to_the_end, progress
        self.started: dict[str, float] = {}
        self.history: dict[str, list[dict[str, float]]] = {}
        self.ended = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.started.setdefault(trial.trial_id, time.monotonic())
        self.history[trial.trial_id] = []

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "status" not in result:
            self.history[trial.trial_id].append(measurement(result))
            self.study.measured(trial.trial_id, self.history[trial.trial_id][-1])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        last = trial.last_result or {}
        if "status" in last:
            self._record(trial, last["status"], last["why"])
        elif last.get("ended"):
            self._record(trial, "done", "")
        elif self.to_the_end:  # nothing stops it but the time that is up
            self.study.let_go(trial.trial_id)
        else:
            self._record(trial, "stopped", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        error = trial.get_pickled_error() or trial.get_error() or RuntimeError("its process died")
        why = f"{type(error).__name__}: {error}".strip()
        self._record(trial, "infeasible" if is_memory(why) else "failed", why.splitlines()[0])

    def _record(self, trial: Any, status: Any, why: str) -> None:
        point = Point.model_validate(trial.config["point"])
        history = self.history.get(trial.trial_id, [])
        metrics = history[-1] if history else {}
        seconds = time.monotonic() - self.started.get(trial.trial_id, time.monotonic())
        times = {"seconds": round(seconds, 3), "training_seconds": round(metrics.get("training_seconds", 0.0), 3)}
        ended = Trial(
            id=self.plan.id_of(point), point=point, status=status, why=why, metrics=metrics, history=history, **times
        )
        self.study.record(trial.trial_id, ended)
        self.plan.clean(point)  # of a driver that was stopped before it could
        self.ended += 1
        self.progress(self.ended, metrics)

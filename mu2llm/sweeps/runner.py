"""The one place that knows Ray Tune: points → trials, as many at once as the cluster holds, each recorded as it ends.

What a sweep needs to go on lies below its `out` (trial.py) and in Optuna's database; Tune's own state is thrown away.
A trial is a thin driver of its stage's Ray Train run, or with `workers_per_trial: 0` trains by itself in a process
that is kept for the next trial, which saves the seconds that a new one needs for its imports.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.callback import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from mu2llm import storage
from mu2llm.errors import UserError
from mu2llm.settings.stages import StageConfig
from mu2llm.settings.sweeps import SweepConfig
from mu2llm.stages.placement import workers_on_nodes
from mu2llm.stages.validation import METRICS
from mu2llm.sweeps.space import Params, Space, canonical, rounded
from mu2llm.sweeps.trial import DIRECTIONS, Plan, Point, Trial, known, run

Progress = Callable[[int, int, dict[str, float]], None]
"""(trials that ended, of how many, the last one's metrics)"""
DRIVER = {"memory": 1.0}  # of a trial whose workers do the work: a share of a CPU would be missing to these


def concurrency(settings: StageConfig, sweep: SweepConfig) -> int:
    """Trials that run at once; a UserError where the cluster holds none, or where trials would shard their model.

    Tune does not reserve what a trial's Train workers need, so more at once than fit would wait for each other for
    ever. A worker must fit a node.
    """
    if settings.fsdp:
        raise UserError(
            f"fsdp={settings.fsdp}: a trial writes reports on rank 0 while it trains, which would then hold a part of "
            "the model: sweep with it unset"
        )
    workers = max(sweep.workers_per_trial, 1)
    each = {"CPU": settings.cpus_per_worker, "GPU": sweep.gpus_per_trial / workers}
    slots = workers_on_nodes(each)
    fit = slots // workers
    if not fit:
        needs = " and ".join(f"{amount:g} {name}" for name, amount in each.items() if amount)
        raise UserError(
            f"a trial needs {workers} × {needs}, and the cluster's nodes hold {slots} of these at once: lower "
            "--workers-per-trial or --gpus-per-trial, or join a larger cluster"
        )
    return min(fit, sweep.max_concurrent or fit)


def search(plan: Plan, space: Space, start: Point, sweep: SweepConfig, progress: Progress | None = None) -> list[Trial]:
    """Runs trials of points that the search proposes, until there are `sweep.trials` of them; all that there are.

    `start` is the point whose params the search fills in. Those recorded before count and are not run again; what
    was interrupted is proposed first.
    """
    before = Trial.read_all(plan.out)
    points = space.grid() if sweep.search == "grid" else space.known_good(plan.base)
    wanted = len(points) if sweep.search == "grid" else sweep.trials
    left = wanted - len(before)
    if left <= 0:
        return before
    study_storage = database(plan.out, sweep)
    proposals = _Proposals(space, start, sweep, study_storage, before, points, f"{plan.stage}-{plan.identity}")
    _tune(plan, sweep, proposals, left, len(before), progress)
    return Trial.read_all(plan.out)


def run_points(
    plan: Plan, points: Sequence[Point], sweep: SweepConfig, progress: Progress | None = None
) -> list[Trial]:
    """Runs given points to their end; their trials, in their order. Those recorded before are not run again."""
    before = {trial.id: trial for trial in Trial.read_all(plan.out)}
    left = [point for point in points if plan.id_of(point) not in before]
    if left:
        given = tune.grid_search([point.model_dump() for point in left])
        _tune(plan, sweep, None, len(left), len(before), progress, {"point": given})
    found = {trial.id: trial for trial in Trial.read_all(plan.out)}
    return [found[plan.id_of(point)] for point in points if plan.id_of(point) in found]


def database(out: str, sweep: SweepConfig) -> optuna.storages.BaseStorage:
    """Where the study is kept: watch it with `optuna-dashboard <url>`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = sweep.storage
    if url is None and not storage.is_remote(out):
        Path(storage.resolve(out)[1]).mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{storage.resolve(out)[1]}/optuna.db"
    if url is None:
        return optuna.storages.InMemoryStorage()
    try:
        return optuna.storages.RDBStorage(url)
    except Exception as error:  # whatever the database's driver raises
        raise UserError(f"sweep.storage: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def _tune(
    plan: Plan,
    sweep: SweepConfig,
    proposals: _Proposals | None,
    trials: int,
    number: int,
    progress: Progress | None,
    param_space: dict[str, Any] | None = None,
) -> None:
    at_once = min(concurrency(getattr(plan.base, plan.stage), sweep), trials)
    _quieten()
    with tempfile.TemporaryDirectory(prefix="mu2llm-tune-", ignore_cleanup_errors=True) as folder:
        tune.Tuner(
            tune.with_resources(_trainable(plan), _resources(plan, sweep)),
            param_space=param_space or {},
            tune_config=tune.TuneConfig(
                search_alg=proposals,
                scheduler=_scheduler(plan, sweep) if proposals else FIFOScheduler(),
                num_samples=trials if proposals else 1,
                max_concurrent_trials=at_once,
                time_budget_s=sweep.time_budget_s,
                reuse_actors=sweep.workers_per_trial == 0,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                callbacks=[_Recorder(plan, number, number + trials, progress)],
            ),
        ).fit()


def _trainable(plan: Plan) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        # how long Tune waits for a stopped trial to let go of its process before it gives that to the next one
        os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")
        run(plan, Point.model_validate(config["point"]), tune.report)

    return trial


def _resources(plan: Plan, sweep: SweepConfig) -> dict[str, float]:
    """Of the trial's own process: next to nothing where workers do the work."""
    if sweep.workers_per_trial:
        return DRIVER
    settings: StageConfig = getattr(plan.base, plan.stage)
    gpus = {"GPU": sweep.gpus_per_trial} if sweep.gpus_per_trial else {}
    return {"CPU": settings.cpus_per_worker, **gpus}


def _scheduler(plan: Plan, sweep: SweepConfig) -> TrialScheduler:
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


def _quieten() -> None:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the command, not this search alone
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # an early report of a trial that went wrong has no numbers; recorded as it is
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Proposals(OptunaSearch):
    """Optuna's proposals as points. A proposal that was made before is trained with the next seed: a repetition."""

    def __init__(
        self,
        space: Space,
        start: Point,
        sweep: SweepConfig,
        database: optuna.storages.BaseStorage,
        before: Sequence[Trial],
        points: Sequence[Params],
        study: str,
    ) -> None:
        self.space, self.start = space, start
        self.made = Counter(canonical(trial.point.params) for trial in before)
        directions: list[str] = [DIRECTIONS[name] for name in sweep.objective]
        several = len(directions) > 1
        self.objective: list[str] = list(sweep.objective)
        seed = start.seed + len(before)  # a sweep that goes on draws on
        samplers = {"optuna": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        super().__init__(
            space=space.distributions(),
            metric=self.objective if several else self.objective[0],
            mode=directions if several else directions[0],
            points_to_evaluate=None,
            sampler=samplers.get(sweep.search, optuna.samplers.RandomSampler)(seed=seed),
            study_name=study,
            storage=database,
        )
        self._catch_up(before)
        self._propose_first(before, points)

    def _catch_up(self, before: Sequence[Trial]) -> None:
        """The study is told of every recorded trial that it does not know, and that what was running is not."""
        study: Any = self._ot_study
        there = Counter(canonical(rounded(self.space.decode(t.params))) for t in study.get_trials(deepcopy=False))
        for old in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(old.number, state=TrialState.FAIL)
        for trial in before:
            key = canonical(trial.point.params)
            if there[key]:
                there[key] -= 1
                continue
            values: list[Any] = [trial.value(name) for name in self.objective]
            whole = all(value is not None for value in values)
            study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.COMPLETE if whole else TrialState.FAIL,
                    values=values if whole else None,
                    params=self.space.encode(trial.point.params),
                    distributions=self.space.distributions(),
                )
            )

    def _propose_first(self, before: Sequence[Trial], points: Sequence[Params]) -> None:
        """Given points and interrupted ones that have no record yet wait at the head of the study's queue."""
        study: Any = self._ot_study
        interrupted = [
            rounded(self.space.decode(t.params))
            for t in study.get_trials(states=(TrialState.FAIL,))
            if t.params.keys() == self.space.domains.keys()  # not one that was killed while it was proposed
        ]
        waiting = [
            rounded(self.space.decode(t.system_attrs["fixed_params"]))
            for t in study.get_trials(states=(TrialState.WAITING,))
        ]
        seen = {canonical(params) for params in [*(trial.point.params for trial in before), *waiting]}
        for params in [*interrupted, *map(rounded, points)]:
            if canonical(params) not in seen:
                seen.add(canonical(params))
                study.enqueue_trial(self.space.encode(params))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        params = rounded(self.space.decode(super().suggest(trial_id) or {}))
        repetition = self.made[canonical(params)]
        self.made[canonical(params)] += 1
        point = self.start.model_copy(update={"params": params, "seed": self.start.seed + repetition})
        return {"point": point.model_dump()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if all(name in result for name in self.objective):
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        status = (result or {}).get("status")
        if status is None:
            super().on_trial_complete(trial_id, result, error)
        elif trial_id not in self._completed_trials:
            # pruned without a value ranks last, so that the search leaves what cannot be trained
            state = TrialState.PRUNED if status == "infeasible" else TrialState.FAIL
            study: Any = self._ot_study
            study.tell(self._ot_trials[trial_id], state=state)
            self._completed_trials.add(trial_id)


class _Recorder(Callback):
    """Runs beside Tune on the driver: every trial's record, as soon as it has ended."""

    def __init__(self, plan: Plan, number: int, total: int, progress: Progress | None) -> None:
        self.plan, self.number, self.total, self.progress = plan, number, total, progress
        self.started: dict[str, float] = {}
        self.history: dict[str, list[dict[str, float]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "progress": None}  # Tune copies its callbacks; a progress bar stays where it is

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.started.setdefault(trial.trial_id, time.monotonic())
        self.history[trial.trial_id] = []

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "status" not in result:
            self.history[trial.trial_id].append(known(result))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        last = trial.last_result or {}
        if "status" in last:
            self._record(trial, last["status"], last["why"])
        else:
            ended = len(self.history[trial.trial_id]) >= self.plan.watch.times
            self._record(trial, "done" if ended else "stopped", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        error = trial.get_pickled_error() or trial.get_error() or RuntimeError("its process died")
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        memory = any(word in f"{why} {error}" for word in ("OutOfMemory", "out of memory"))
        self._record(trial, "infeasible" if memory else "failed", why)

    def _record(self, trial: Any, status: Any, why: str) -> None:
        point = Point.model_validate(trial.config["point"])
        history = self.history.get(trial.trial_id, [])
        seconds = time.monotonic() - self.started.get(trial.trial_id, time.monotonic())
        metrics = history[-1] if history else {}
        training = metrics.get("training_seconds", 0.0)
        record = Trial(
            id=self.plan.id_of(point),
            number=self.number,
            point=point,
            status=status,
            why=why,
            metrics=metrics,
            history=history,
            seconds=round(seconds, 3),
            training_seconds=round(training, 3),
            overhead_seconds=round(seconds - training, 3),
        )
        record.write(self.plan.out)
        if not point.keep:
            for name in ("checkpoint", "checkpoint.state"):  # of a driver that was stopped before it could
                storage.delete(storage.join(self.plan.place(point), name))
        self.number += 1
        if self.progress:
            self.progress(self.number, self.total, metrics)

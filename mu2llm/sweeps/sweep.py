"""What the sweeps share: refused before it starts or searched to its end, told as a table, a page and JSON.

Below `out`: sweep.json (what is swept), trials/, optuna.db, leaderboard.parquet, sweep.html, results.json; final/ holds
the winner and the default, each trained with several seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mu2llm import artefacts, config, storage, tracking
from mu2llm.config import Experiment
from mu2llm.errors import Failure, UserError
from mu2llm.stages.job import Watch
from mu2llm.sweeps import pairs, results
from mu2llm.sweeps.final import Final, compare
from mu2llm.sweeps.page import write_page
from mu2llm.sweeps.runner import concurrency, search
from mu2llm.sweeps.space import Space, apply
from mu2llm.sweeps.trial import DIRECTIONS, Plan, Point, Trial

FILE, RESULTS = "sweep.json", "results.json"
SPENDS = {
    *("trials", "max_concurrent", "max_failures", "time_budget_s", "storage"),
    *("workers_per_trial", "gpus_per_trial", "final_seeds", "final_split"),
}
"""What of `sweep` may differ when a sweep goes on: how much is spent, and where."""
Show = Callable[[str, float, float, dict[str, float]], None]


@dataclass(frozen=True)
class Sweep:
    """One sweep: of which command, over what, from where. `shards` are those that its cases lie in."""

    kind: Literal["tokenizer", "dpo"]
    stage: Literal["sft", "dpo"]
    space: Space
    experiment: Experiment
    data: str
    init: str
    shards: str
    checksum: str
    out: str

    @property
    def identity(self) -> str:
        values = self.experiment.model_dump(mode="json", exclude={"sweep": SPENDS})
        domains = {key: domain.model_dump(mode="json") for key, domain in self.space.domains.items()}
        return artefacts.digest([self.kind, values, domains, self.checksum])

    @property
    def start(self) -> Point:
        return Point(params={}, seed=self.experiment.seed, data=self.data, init=self.init)


def run(sweep: Sweep, prepare: Callable[[], None], resume: bool, show: Show | None = None) -> dict[str, Any]:
    """Searches, compares the winner with the default, writes what came of it; what the command prints.

    `prepare` makes what all trials share. Raises UserError where no trial fits the cluster, where `out` holds another
    sweep, or holds this one and `resume` is not given; Failure where no trial came to its end.
    """
    settings = sweep.experiment.sweep
    at_once = concurrency(getattr(sweep.experiment, sweep.stage), settings)
    tracked = _claim(sweep, resume)
    with tracking.under(tracked):
        prepare()
        plan = plan_of(sweep, tracked)
        told = _teller("trials", show)
        trials = search(plan, sweep.space, sweep.start, settings, told)
        rows = results.ranked(trials, settings.objective)
        best = results.winner(rows, settings.objective)
        if best is None:
            tracking.end_stage(tracked, {}, "FAILED")
            why = next((trial.why for trial in trials if trial.why), "none was measured")
            raise Failure(f"none of {len(trials)} trials came to its end: {results.statuses(trials)}, such as: {why}")
        found = _summary(sweep, trials, rows, best, None, at_once)
        _write(sweep, trials, rows, found, None)  # kept, whatever becomes of the final trainings
        if settings.final_seeds:
            try:
                final = compare(plan, best, sweep, _teller("final", show))
            except Failure:
                tracking.end_stage(tracked, {}, "FAILED")
                raise
            found = _summary(sweep, trials, rows, best, final, at_once)
            _write(sweep, trials, rows, found, final)
    tracking.end_stage(tracked, {"leaderboard": storage.lasting(storage.join(sweep.out, results.LEADERBOARD))})
    return found


def _write(
    sweep: Sweep, trials: Sequence[Trial], rows: Sequence[results.Row], found: dict[str, Any], final: Final | None
) -> None:
    results.write_parquet(sweep.out, trials)
    write_page(sweep, trials, rows, found, final)
    storage.write_json(storage.join(sweep.out, RESULTS), found)


def plan_of(sweep: Sweep, tracked: tracking.StageRun | None, watch: Watch | None = None, out: str = "") -> Plan:
    """What the trials share."""
    settings, store = sweep.experiment.sweep, tracking.store()
    kl = sweep.stage == "dpo"
    return Plan(
        stage=sweep.stage,
        experiment=sweep.experiment.model_dump(mode="json"),
        out=out or sweep.out,
        watch=watch or Watch(times=settings.reports, cases=settings.cases, kl=kl),
        identity=artefacts.digest([sweep.experiment.model_dump(mode="json", exclude={"sweep"}), sweep.checksum]),
        store=store if store.startswith("sqlite:") else None,
        parent=tracked,
    )


def plan_text(sweep: Sweep) -> str:
    """What `--dry-run` says that it needs."""
    settings, stage = sweep.experiment.sweep, getattr(sweep.experiment, sweep.stage)
    workers = max(settings.workers_per_trial, 1)
    count = len(sweep.space.grid()) if settings.search == "grid" else settings.trials
    each = f"{workers} × {stage.cpus_per_worker:g} CPU, {settings.gpus_per_trial:g} GPU"
    return f"{count} trials of {each}; searched: {', '.join(sweep.space.domains)}"


def _claim(sweep: Sweep, resume: bool) -> tracking.StageRun:
    """Takes `out` for this sweep, or goes on with it; its tracked run, the trials' parent."""
    path = storage.join(sweep.out, FILE)
    key = None
    if storage.exists(path):
        there = storage.read_json(path)
        if there["identity"] != sweep.identity:
            raise UserError(f"{sweep.out} holds a sweep of another configuration or data; give another --out")
        if not resume:
            done = len(Trial.read_all(sweep.out))
            raise UserError(f"{sweep.out} holds this sweep with {done} trials; --resume goes on with it")
        key = there["run"]
    tags = {"data": sweep.data, "parent": sweep.init, "sweep": sweep.kind}
    tracked = tracking.start_stage("sweep", sweep.experiment.model_dump(mode="json"), tags, key=key)
    storage.write_json(
        path,
        {
            **{"identity": sweep.identity, "kind": sweep.kind, "data": sweep.data, "init": sweep.init},
            "objective": {name: DIRECTIONS[name] for name in sweep.experiment.sweep.objective},
            "space": {key: domain.model_dump(exclude_none=True) for key, domain in sweep.space.domains.items()},
            "run": tracked.key,
        },
    )
    return tracked


def _teller(step: str, show: Show | None) -> Callable[[int, int, dict[str, float]], None]:
    def told(done: int, total: int, metrics: dict[str, float]) -> None:
        if show:
            show(step, done, total, metrics)

    return told


def _summary(
    sweep: Sweep,
    trials: Sequence[Trial],
    rows: Sequence[results.Row],
    best: results.Row,
    final: Final | None,
    at_once: int,
) -> dict[str, Any]:
    """What the command prints as JSON and results.json holds."""
    objective = sweep.experiment.sweep.objective
    try:
        base = config.load(sweep.experiment.name)
    except UserError:  # a preset that is no longer there: every value is named
        base = config.validate({"data": {"spec": sweep.experiment.data.spec.model_dump(mode="json")}})
    return {
        "trials": len(trials),
        "statuses": results.statuses(trials),
        "objective": {name: DIRECTIONS[name] for name in objective},
        "best": _told(best, objective),
        "front": [_told(row, objective) for row in results.front(rows, objective)] if len(objective) > 1 else None,
        "importance": {name: results.importance(trials, sweep.space, name) for name in objective},
        "at_once": at_once,
        "seconds": {
            "trials": round(sum(trial.seconds for trial in trials), 1),
            "overhead_median": sorted(trial.overhead_seconds for trial in trials)[len(trials) // 2],
        },
        "final": final.model_dump() if final else None,
        "command": results.command(
            sweep.stage, {"data": _data(sweep, best), "init": sweep.init}, best.params, sweep.experiment, base
        ),
        "leaderboard": storage.join(sweep.out, results.LEADERBOARD),
        "page": storage.join(sweep.out, "sweep.html"),
    }


def _data(sweep: Sweep, best: results.Row) -> str:
    """What the best was trained on: its own pairs, where the search was over these too."""
    if not set(pairs.KEYS) & set(best.params):
        return sweep.data
    return pairs.place(storage.join(sweep.out, "pairs"), apply(sweep.experiment, best.params).preferences)


def _told(row: results.Row, objective: Sequence[str]) -> dict[str, Any]:
    found = {name: row.estimate(name) for name in results.measured([row], objective)}
    return {
        "params": row.params,
        **{name: estimate.model_dump() for name, estimate in found.items() if estimate},
        "trials": [trial.id for trial in row.trials],
        "seeds": [trial.point.seed for trial in row.trials],
    }

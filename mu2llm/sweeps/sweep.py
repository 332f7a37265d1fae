"""What the sweeps share: refused before it starts or searched to its end, told as a table, a page and JSON.

Below `out`: sweep.json (what is swept), the study (study.py), trials/ (their last reports), leaderboard.parquet,
sweep.html, results.json; final/ holds the winner and the default, each trained with several seeds.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import optuna

from mu2llm import artefacts, config, storage, tracking
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.errors import Failure, UserError
from mu2llm.records import Checkpoint
from mu2llm.stages.job import check_parent
from mu2llm.sweeps import pairs, results
from mu2llm.sweeps.final import Final, final
from mu2llm.sweeps.page import PAGE, write_page
from mu2llm.sweeps.runner import concurrency, run_trials
from mu2llm.sweeps.space import Params, apply
from mu2llm.sweeps.study import Study, database, importance, recorded
from mu2llm.sweeps.trial import DIRECTIONS, Plan, Point, Trial

FILE, RESULTS = "sweep.json", "results.json"
SPENDS = {
    *("trials", "max_concurrent", "max_failures", "time_budget_s", "storage"),
    *("workers_per_trial", "gpus_per_trial", "final_seeds", "final_split"),
}
"""What of `sweep` may differ when a sweep goes on: how much is spent, and where."""
Show = Callable[[str, float, float, dict[str, float]], None]


def quiet(step: str, done: float, total: float, numbers: dict[str, float]) -> None:
    """Shows nothing."""


def check_inputs(shards: Shards, parent: Checkpoint, experiment: Experiment, splits: set[str]) -> None:
    """A UserError where shards, checkpoint and preset do not fit together, or a split has nothing to measure on."""
    specs = {f"preset {experiment.name}": experiment.data.spec.hash, parent.uri: parent.lineage.spec_hash}
    for what, given in specs.items():
        if given != shards.spec.hash:
            raise UserError(
                f"{shards.uri} has spec {shards.spec.name} ({shards.spec.hash}), {what} expects {given}: name the "
                "preset that it was ingested with"
            )
    check_parent(parent, experiment)
    for split in sorted(splits):
        if not shards.count(split):
            raise UserError(f"{shards.uri} has no rows in split {split}, on which trials are measured")


def measured_on(experiment: Experiment) -> set[str]:
    """The splits that a sweep measures its trials on."""
    return {"validation", experiment.sweep.final_split} if experiment.sweep.final_seeds else {"validation"}


def run(plan: Plan, prepare: Callable[[], None], resume: bool, show: Show = quiet) -> dict[str, Any]:
    """Searches, compares the winner with the default, writes what came of it; what the command prints.

    `prepare` makes what all trials share. Raises UserError where no trial fits the cluster, where `out` holds another
    sweep, or holds this one and `resume` is not given; Failure where no trial came to its end.
    """
    base = plan.base
    sweep, space = base.sweep, plan.space
    at_once = concurrency(getattr(base, plan.stage), sweep)
    kept = database(plan.out, sweep.storage)
    tracked, name = _claim(plan, kept, resume)
    plan = plan.model_copy(update={"parent": tracked})
    start = Point(seed=base.seed)
    study = Study(kept, name, sweep.objective, start, space)
    points = space.grid() if sweep.search == "grid" else space.first(base)
    wanted = len(points) if sweep.search == "grid" else sweep.trials
    try:
        with tracking.under(tracked):
            prepare()
            first = [start.model_copy(update={"params": params}) for params in points]
            trials = run_trials(plan, study, first, partial(show, "trials"), wanted)
            best = results.winner(results.ranked(trials, sweep.objective), sweep.objective)
            if best is None:
                why = next((trial.why for trial in trials if trial.why), "none was measured")
                counts = results.statuses(trials)
                raise Failure(f"none of {len(trials)} trials came to its end: {counts}, such as: {why}")
            found = _write(plan, study, trials, at_once, None)  # kept, whatever becomes of the final trainings
            if sweep.final_seeds:
                again = Study(kept, f"{name}-final", sweep.objective, start)
                compared = final(plan, again, best.params, partial(show, "final"))
                found = _write(plan, study, trials, at_once, compared)
    except Failure:
        tracking.end_stage(tracked, {}, "FAILED")
        raise
    tracking.end_stage(tracked, {"leaderboard": storage.lasting(found["leaderboard"])})
    return found


def trials_of(out: str, url: str | None = None) -> list[Trial]:
    """The recorded trials of the sweep that lies in `out`, in the order in which they ended."""
    return recorded(database(out, url), storage.read_json(storage.join(out, FILE))["study"])


def plan_text(plan: Plan) -> str:
    """What `--dry-run` says that it needs."""
    sweep, stage = plan.base.sweep, getattr(plan.base, plan.stage)
    count = len(plan.space.grid()) if sweep.search == "grid" else sweep.trials
    each = f"{max(sweep.workers_per_trial, 1)} × {stage.cpus_per_worker:g} CPU, {sweep.gpus_per_trial:g} GPU"
    return f"{count} trials of {each}; searched: {', '.join(plan.domains)}"


def _claim(plan: Plan, kept: optuna.storages.BaseStorage, resume: bool) -> tuple[tracking.StageRun, str]:
    """Takes `out` for this sweep, or goes on with it; its tracked run, the trials' parent, and its study's name."""
    path, values = storage.join(plan.out, FILE), {**plan.experiment, "name": ""}
    values["sweep"] = {name: value for name, value in values["sweep"].items() if name not in SPENDS}
    domains = {key: domain.model_dump(mode="json", exclude_none=True) for key, domain in plan.domains.items()}
    identity = artefacts.digest([plan.kind, values, domains, plan.checksum])
    there = storage.read_json(path) if storage.exists(path) else None
    if there:
        if there["identity"] != identity:
            raise UserError(f"{plan.out} holds a sweep of another configuration or data; give another --out")
        done = len(recorded(kept, there["study"]))
        if not resume:
            raise UserError(f"{plan.out} holds this sweep with {done} trials; --resume goes on with it")
    tags = {"data": plan.data, "parent": plan.init, "sweep": plan.kind}
    tracked = tracking.start_stage("sweep", plan.experiment, tags, key=there and there["run"])
    objective = {name: DIRECTIONS[name] for name in plan.base.sweep.objective}
    if there is None:
        what = {"identity": identity, "kind": plan.kind, "objective": objective, "space": domains, "run": tracked.key}
        there = {**what, "study": f"{plan.kind}-{tracked.key}", "data": plan.data, "init": plan.init}
        Study(kept, there["study"], list(objective), Point(seed=0))  # before it is named
        storage.write_json(path, there)
    return tracked, there["study"]


def _write(plan: Plan, study: Study, trials: Sequence[Trial], at_once: int, compared: Final | None) -> dict[str, Any]:
    """The table, the page and results.json, which is what the command prints."""
    objective = study.objective
    rows = results.ranked(trials, objective)
    best = results.winner(rows, objective)
    assert best
    found: dict[str, Any] = {
        "trials": len(trials),
        "statuses": results.statuses(trials),
        "objective": {name: DIRECTIONS[name] for name in objective},
        "best": _point(best, objective),
        "front": [_point(row, objective) for row in results.front(rows, objective)] if len(objective) > 1 else None,
        "importance": {name: importance(study, name) for name in objective},
        "at_once": at_once,
        "seconds": {
            "trials": round(sum(trial.seconds for trial in trials), 1),
            "overhead_median": sorted(trial.overhead_seconds for trial in trials)[len(trials) // 2],
        },
        "final": compared and compared.model_dump(),
        "command": command(plan, best.params),
        "leaderboard": storage.join(plan.out, results.LEADERBOARD),
        "page": storage.join(plan.out, PAGE),
    }
    results.write_table(found["leaderboard"], results.parquet(trials))
    write_page(plan, trials, rows, found, compared)
    storage.write_json(storage.join(plan.out, RESULTS), found)
    return found


def _point(row: results.Row, objective: Sequence[str]) -> dict[str, Any]:
    estimates = {name: row.estimate(name) for name in results.measured([row], objective)}
    return {
        "params": row.params,
        **{name: estimate.model_dump() for name, estimate in estimates.items() if estimate},
        "trials": [trial.id for trial in row.trials],
        "seeds": [trial.point.seed for trial in row.trials],
    }


def command(plan: Plan, params: Params) -> str:
    """The command that trains this again: the preset, what the sweep's own configuration changed of it, the params."""
    experiment, data = plan.base, plan.data
    if set(pairs.KEYS) & set(params):  # its own pairs, where the search was over these too
        data = pairs.place(storage.join(plan.out, "pairs"), apply(experiment, params).preferences)
    try:
        base = config.load(experiment.name)
    except UserError:  # a preset that is no longer there: every value is named
        base = config.validate({"data": {"spec": experiment.data.spec.model_dump(mode="json")}})
    changed = results.changes(base.model_dump(mode="json"), plan.experiment) | params
    left_out = ("sweep.", "name", *(["preferences."] if plan.stage == "dpo" else []))
    sets = [f"{key}={results.plain(value)}" for key, value in changed.items() if not key.startswith(left_out)]
    words = ["mu2llm", "train", plan.stage, "--data", data, "--init", plan.init, "--out", "winner"]
    return shlex.join([*words, "--preset", experiment.name, *(part for each in sets for part in ("--set", each))])

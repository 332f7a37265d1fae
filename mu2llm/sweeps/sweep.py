"""`mu2llm sweep`: what is searched and from where, refused before it starts or searched to its end, told as JSON.

tokenizer: scales, top_k, queries, temperature, attention, layers; a trial trains SFT from one contrastive checkpoint.
dpo: beta, loss, learning rate, and of the pairs their margin and number a case; a trial trains DPO from one SFT
checkpoint. With frozen vision every scan is encoded once, before the first trial, and in a DPO sweep the reference's
log-probabilities are computed once, for every pair that any trial can use.

Below `out`: sweep.json (what is swept), the study (study.py), trials/ (their last reports), leaderboard.parquet,
sweep.html, results.json; final/ holds the winner and the default, each trained with several seeds.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from optuna.storages import BaseStorage

from mu2llm import artefacts, config, storage, tracking
from mu2llm.artefacts import Identity, open_checkpoint
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.engine.features import encode_scans
from mu2llm.errors import Failure, UserError
from mu2llm.progress import Steps
from mu2llm.records import Checkpoint
from mu2llm.stages import dpo
from mu2llm.stages.job import Watch, check_parent
from mu2llm.stages.preferences import Preferences, read_pairs
from mu2llm.sweeps import pairs, results
from mu2llm.sweeps.final import Final, final
from mu2llm.sweeps.page import PAGE, write_page
from mu2llm.sweeps.runner import concurrency, run_trials
from mu2llm.sweeps.space import Params, Space, apply
from mu2llm.sweeps.study import Study, database, importance, recorded
from mu2llm.sweeps.trial import DIRECTIONS, Plan, Point, Trial

FILE = "sweep.json"
SPENDS = {
    *("trials", "max_concurrent", "max_failures", "time_budget_s", "storage"),
    *("workers_per_trial", "gpus_per_trial", "final_seeds", "final_split"),
}
"""What of `sweep` may differ when a sweep goes on: how much is spent, and where."""
Kind = Literal["tokenizer", "dpo"]


def quiet(step: str, done: float, total: float, numbers: dict[str, float]) -> None:
    """Shows nothing."""


# ---- what is swept


def plan(kind: Kind, data: str, init: str | None, out: str, experiment: Experiment) -> Plan:
    """What would be swept: over shards, or over the pairs that `prefer` wrote.

    Raises UserError where data, checkpoint, preset and space do not fit together.
    """
    settings = experiment.sweep
    preferences = Preferences.open(data) if kind == "dpo" else None
    init = init or (preferences.checkpoint if preferences else None)
    if init is None:
        raise UserError("--init: a tokenizer sweep starts from a contrastive checkpoint; name it")
    shards, parent = Shards.open(preferences.shards if preferences else data), open_checkpoint(init)
    if preferences is None and "kl" in settings.objective:
        raise UserError("sweep.objective kl is a distance to a reference: it is for mu2llm sweep dpo")
    if preferences is None:
        check_contrastive(parent, "a tokenizer sweep")
    check_inputs(shards, parent, experiment, {"validation", *([settings.final_split] if settings.final_seeds else [])})
    space = Space.load(kind, experiment)
    if preferences:
        dpo.check(preferences, preferences.scans(), read_pairs(data), init)
        pairs.check(data, space.domains)
    return Plan(
        kind=kind,
        stage="dpo" if preferences else "sft",
        experiment=experiment.model_dump(mode="json"),
        domains=space.domains,
        data=storage.absolute(data),
        init=storage.absolute(init),
        shards=shards.uri,
        checksum=checksum(preferences.identity if preferences else shards.checksum, parent),
        out=storage.absolute(out),
        watch=Watch(times=settings.reports, cases=settings.cases, kl=preferences is not None),
    )


def check_contrastive(parent: Checkpoint, what: str) -> None:
    if parent.lineage.stage != "contrastive":
        raise UserError(
            f"{parent.uri} is of stage {parent.lineage.stage}: its tokenizer has its shape already; {what} starts from "
            "a contrastive checkpoint"
        )


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


def checksum(data: str, parent: Checkpoint) -> str:
    """Of what all trials are trained on and from, wherever it lies."""
    return artefacts.digest([data, artefacts.weights_of(parent).weights])


def prepare_features(experiment: Experiment, shards: str, init: str) -> None:
    """The features of all scans, for all trials that train SFT from this checkpoint."""
    settings = experiment.sft
    if settings.cached:
        encode_scans(init, Shards.open(shards), settings.inference())


def prepare_reference(experiment: Experiment, data: str, init: str, out: str) -> None:
    """Features and reference log-probabilities, for all trials that train DPO on these pairs from this checkpoint."""
    job = dpo.job_of(data, out, experiment, init)
    dpo.prepared(job, read_pairs(job.data))


def plan_text(plan: Plan) -> str:
    """What `--dry-run` says that it needs."""
    sweep, stage = plan.base.sweep, getattr(plan.base, plan.stage)
    count = len(plan.space.grid()) if sweep.search == "grid" else sweep.trials
    each = f"{max(sweep.workers_per_trial, 1)} × {stage.cpus_per_worker:g} CPU, {sweep.gpus_of(stage):g} GPU"
    return f"{count} trials of {each}; searched: {', '.join(plan.domains)}"


# ---- the sweep


def run(plan: Plan, resume: bool = False, show: Steps = quiet) -> dict[str, Any]:
    """Searches, compares the winner with the default, writes what came of it; what the command prints.

    Raises UserError where no trial fits the cluster, where `out` holds another sweep, or holds this one and `resume`
    is not given; Failure where no trial came to its end.
    """
    base, space = plan.base, plan.space
    sweep, start = base.sweep, Point(seed=base.seed)
    slots = concurrency(getattr(base, plan.stage), sweep)
    kept = database(plan.out, sweep.storage)
    tracked, name = _claim(plan, kept, resume)
    plan = plan.model_copy(update={"parent": tracked})
    study = Study(kept, name, sweep.objective, start, space)
    params = space.grid() if sweep.search == "grid" else space.first(base)
    points = [start.model_copy(update={"params": each}) for each in params]
    try:
        with tracking.under(tracked):
            _prepare(plan)
            wanted = len(points) if sweep.search == "grid" else sweep.trials
            at_once = min(slots, wanted)
            trials = run_trials(plan, study, points, partial(show, "trials"), wanted)
            best = results.winner(results.ranked(trials, sweep.objective), sweep.objective)
            if best is None:
                counts, why = statuses(trials), next((each.why for each in trials if each.why), "none was measured")
                raise Failure(f"none of {len(trials)} trials came to its end: {counts}, such as: {why}")
            found = _write(plan, study, trials, at_once, None)  # kept, whatever becomes of the final trainings
            if sweep.final_seeds:
                again = Study(kept, f"{name}-final", sweep.objective, start)
                found = _write(plan, study, trials, at_once, final(plan, again, best.params, partial(show, "final")))
    except Failure:
        tracking.end_stage(tracked, {}, "FAILED")
        raise
    tracking.end_stage(tracked, {"leaderboard": storage.lasting(found["leaderboard"])})
    return found


def trials_of(out: str, url: str | None = None) -> list[Trial]:
    """The recorded trials of the sweep that lies in `out`, in the order in which they ended."""
    return recorded(database(out, url), storage.read_json(storage.join(out, FILE))["study"])


def _claim(plan: Plan, kept: BaseStorage, resume: bool) -> tuple[tracking.StageRun, str]:
    """Takes `out` for this sweep, or goes on with it; its tracked run, the trials' parent, and its study's name."""
    path, searched = storage.join(plan.out, FILE), artefacts.decides("sweep", plan.base.sweep, leave_out=SPENDS)
    domains = {key: domain.model_dump(mode="json", exclude_none=True) for key, domain in plan.domains.items()}
    identity = Identity.of({"kind": plan.kind, **plan.decides(), **searched, "space": domains})
    there = storage.read_json(path) if storage.exists(path) else None
    if there:
        identity.check(plan.out, "a sweep", there["identity"], there.get("inputs", {}), "give another --out")
    done = len(recorded(kept, there["study"])) if there else 0
    if there and not resume:
        raise UserError(f"{plan.out} holds this sweep with {done} trials; --resume goes on with it")
    tags = {"data": plan.data, "parent": plan.init, "sweep": plan.kind}
    tracked = tracking.start_stage("sweep", plan.experiment, tags, key=there and there["run"])
    if there:
        return tracked, there["study"]
    name, objective = f"{plan.kind}-{tracked.key}", plan.base.sweep.objective
    Study(kept, name, objective, Point(seed=0))  # before it is named
    what = {
        "identity": identity.digest,
        "inputs": identity.inputs,
        "kind": plan.kind,
        "study": name,
        "run": tracked.key,
        "space": domains,
    }
    storage.write_json(path, {**what, "objective": objective, "data": plan.data, "init": plan.init})
    return tracked, name


def _prepare(plan: Plan) -> None:
    """What all trials share."""
    if plan.stage == "sft":
        return prepare_features(plan.base, plan.data, plan.init)
    searched = pairs.searched(plan.domains)
    data = pairs.superset(plan.data, plan.pairs, plan.base.preferences) if searched else plan.data
    return prepare_reference(plan.base, data, plan.init, plan.out)


# ---- what is told


def statuses(trials: Sequence[Trial]) -> dict[str, int]:
    """How many trials ended how."""
    return dict(Counter(trial.status for trial in trials))


def _write(plan: Plan, study: Study, trials: Sequence[Trial], at_once: int, compared: Final | None) -> dict[str, Any]:
    """The table, the page and results.json, which is what the command prints."""
    objective = study.objective
    rows = results.ranked(trials, objective)
    front = [_point(row, objective) for row in results.front(rows, objective)]
    found: dict[str, Any] = {
        "trials": len(trials),
        "statuses": statuses(trials),
        "objective": {name: DIRECTIONS[name] for name in objective},
        "best": front[0],
        "front": front if len(objective) > 1 else None,
        "importance": {name: importance(study, name) for name in objective},
        "at_once": at_once,
        "seconds": {
            "trials": round(sum(trial.seconds for trial in trials), 1),
            "overhead_median": sorted(trial.overhead_seconds for trial in trials)[len(trials) // 2],
        },
        "final": compared and compared.model_dump(),
        "command": command(plan, front[0]["params"]),
        "leaderboard": results.write_leaderboard(plan.out, trials),
        "page": storage.join(plan.out, PAGE),
    }
    write_page(plan, trials, rows, found, compared)
    storage.write_json(storage.join(plan.out, "results.json"), found)
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
    if pairs.searched(params):
        data = pairs.place(plan.pairs, apply(experiment, params).preferences)
    try:
        base = config.load(experiment.name)
    except UserError:  # a preset that is no longer there: every value is named
        base = config.validate({"data": {"spec": experiment.data.spec.model_dump(mode="json")}})
    changed = results.changes(base.model_dump(mode="json"), plan.experiment) | params
    left_out = ("sweep.", "name", *(["preferences."] if plan.stage == "dpo" else []))
    sets = [f"{key}={results.plain(value)}" for key, value in changed.items() if not key.startswith(left_out)]
    words = ["mu2llm", "train", plan.stage, "--data", data, "--init", plan.init, "--out", "winner"]
    return shlex.join([*words, "--preset", experiment.name, *(part for each in sets for part in ("--set", each))])

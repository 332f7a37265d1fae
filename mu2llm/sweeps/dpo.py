"""`mu2llm sweep dpo`: beta, loss, learning rate, and of the pairs their margin and number a case.

A trial trains DPO from one SFT checkpoint. The scans' features and the reference's log-probabilities are made once,
before the first trial, for every pair that any trial can use.
"""

from __future__ import annotations

from typing import Any

from mu2llm import artefacts, storage
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.errors import UserError
from mu2llm.stages import dpo
from mu2llm.stages.job import check_parent, new_job
from mu2llm.stages.preferences import Preferences, read_pairs
from mu2llm.sweeps import pairs
from mu2llm.sweeps.space import Space
from mu2llm.sweeps.sweep import Show, Sweep, run
from mu2llm.sweeps.tokenizer import check_cases, check_spec


def sweep(
    data: str, init: str | None, out: str, experiment: Experiment, resume: bool = False, show: Show | None = None
) -> dict[str, Any]:
    """Runs the sweep; what the command prints. Raises UserError before anything starts where it cannot work."""
    planned = plan(data, init, out, experiment)
    return run(planned, lambda: share(planned), resume, show)


def plan(data: str, init: str | None, out: str, experiment: Experiment) -> Sweep:
    """What would be swept, over the pairs that `prefer` wrote at `data`; a UserError where they do not fit together."""
    preferences = Preferences.open(data)
    init = init or preferences.checkpoint
    shards, parent = Shards.open(preferences.shards), open_checkpoint(init)
    check_spec(shards, parent, experiment)
    check_parent(parent, experiment)
    check_cases(shards, experiment)
    dpo.check(preferences, shards, read_pairs(data), init)
    space = Space.load("dpo", experiment)
    for key in space.domains:
        if key.startswith("preferences.") and key not in pairs.KEYS:
            raise UserError(f"sweep.space.{key} needs other candidates: run mu2llm prefer for each, and sweep those")
    if set(pairs.KEYS) & set(space.domains):
        pairs.read_judged(data)
    checksum = artefacts.digest([preferences.identity, parent.lineage.identity])
    return Sweep(
        kind="dpo",
        stage="dpo",
        space=space,
        experiment=experiment,
        data=storage.absolute(data),
        init=storage.absolute(init),
        shards=shards.uri,
        checksum=checksum,
        out=storage.absolute(out),
    )


def share(sweep: Sweep) -> None:
    """Features and reference log-probabilities for all trials."""
    experiment, data = sweep.experiment, sweep.data
    if set(pairs.KEYS) & set(sweep.space.domains):
        data = pairs.superset(data, storage.join(sweep.out, "pairs"), experiment.preferences)
    preferences, made = Preferences.open(data), read_pairs(data)
    shards = Shards.open(preferences.shards)
    job = new_job("dpo", shards, sweep.out, experiment, sweep.init, data=data, rows=len(made)).model_copy(
        update={"shards": shards.uri, "split": preferences.split}
    )
    dpo.prepared(job, shards, made)

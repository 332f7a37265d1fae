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
from mu2llm.stages.job import Watch, new_job
from mu2llm.stages.preferences import Preferences, read_pairs
from mu2llm.sweeps import pairs
from mu2llm.sweeps.space import Space
from mu2llm.sweeps.sweep import Show, check_inputs, measured_on, quiet, run
from mu2llm.sweeps.trial import Plan


def sweep(
    data: str, init: str | None, out: str, experiment: Experiment, resume: bool = False, show: Show = quiet
) -> dict[str, Any]:
    """Runs the sweep; what the command prints. Raises UserError before anything starts where it cannot work."""
    planned = plan(data, init, out, experiment)

    def prepare() -> None:
        made = planned.data
        if _searched(planned.space):
            made = pairs.superset(made, storage.join(planned.out, "pairs"), experiment.preferences)
        share(made, planned.init, planned.out, experiment)

    return run(planned, prepare, resume, show)


def plan(data: str, init: str | None, out: str, experiment: Experiment) -> Plan:
    """What would be swept, over the pairs that `prefer` wrote at `data`; a UserError where they do not fit together."""
    preferences = Preferences.open(data)
    init = init or preferences.checkpoint
    shards, parent = Shards.open(preferences.shards), open_checkpoint(init)
    check_inputs(shards, parent, experiment, measured_on(experiment))
    dpo.check(preferences, shards, read_pairs(data), init)
    space = Space.load("dpo", experiment)
    for key in space.domains:
        if key.startswith("preferences.") and key not in pairs.KEYS:
            raise UserError(f"sweep.space.{key} needs other candidates: run mu2llm prefer for each, and sweep those")
    if _searched(space):
        pairs.read_judged(data)
    return Plan(
        **{"kind": "dpo", "stage": "dpo", "experiment": experiment.model_dump(mode="json"), "shards": shards.uri},
        **{"data": storage.absolute(data), "init": storage.absolute(init), "out": storage.absolute(out)},
        domains=space.domains,
        checksum=artefacts.digest([preferences.identity, parent.lineage.identity]),
        watch=Watch(times=experiment.sweep.reports, cases=experiment.sweep.cases, kl=True),
    )


def share(data: str, init: str, out: str, experiment: Experiment) -> None:
    """Features and reference log-probabilities for all trials on these pairs from this checkpoint."""
    preferences, made = Preferences.open(data), read_pairs(data)
    shards = Shards.open(preferences.shards)
    job = new_job("dpo", shards, out, experiment, init, data=data, rows=len(made))
    dpo.prepared(job.model_copy(update={"shards": shards.uri, "split": preferences.split}), shards, made)


def _searched(space: Space) -> bool:
    """Whether the search is over what makes the pairs, too."""
    return bool(set(pairs.KEYS) & set(space.domains))

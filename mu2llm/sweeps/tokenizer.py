"""`mu2llm sweep tokenizer`: scales, top_k, queries, temperature, attention and layers of the μ²Tokenizer.

A trial trains SFT from the same contrastive checkpoint on the same shards. With frozen vision every scan is encoded
once, before the first trial, and all trials read the features.
"""

from __future__ import annotations

from typing import Any

from mu2llm import artefacts, storage
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.engine.features import encode_scans
from mu2llm.errors import UserError
from mu2llm.stages.job import Watch
from mu2llm.sweeps.space import Space
from mu2llm.sweeps.sweep import Show, check_inputs, measured_on, quiet, run
from mu2llm.sweeps.trial import Plan


def sweep(
    data: str, init: str, out: str, experiment: Experiment, resume: bool = False, show: Show = quiet
) -> dict[str, Any]:
    """Runs the sweep; what the command prints. Raises UserError before anything starts where it cannot work."""
    planned = plan(data, init, out, experiment)
    return run(planned, lambda: share(experiment, planned.data, planned.init), resume, show)


def plan(data: str, init: str, out: str, experiment: Experiment) -> Plan:
    """What would be swept; a UserError where data, checkpoint and space do not fit together."""
    shards, parent = Shards.open(data), open_checkpoint(init)
    if parent.lineage.stage != "contrastive":
        raise UserError(
            f"{init} is of stage {parent.lineage.stage}: its tokenizer has its shape already; a tokenizer sweep "
            "starts from a contrastive checkpoint"
        )
    if "kl" in experiment.sweep.objective:
        raise UserError("sweep.objective kl is a distance to a reference: it is for mu2llm sweep dpo")
    check_inputs(shards, parent, experiment, measured_on(experiment))
    return Plan(
        **{"kind": "tokenizer", "stage": "sft", "experiment": experiment.model_dump(mode="json")},
        **{"data": shards.uri, "init": storage.absolute(init), "shards": shards.uri, "out": storage.absolute(out)},
        domains=Space.load("tokenizer", experiment).domains,
        checksum=artefacts.digest([shards.checksum, parent.lineage.identity]),
        watch=Watch(times=experiment.sweep.reports, cases=experiment.sweep.cases),
    )


def share(experiment: Experiment, shards: str, init: str) -> None:
    """The features of all scans, for all trials that train SFT from this checkpoint."""
    settings = experiment.sft
    if settings.freeze_vision and settings.cache_vision:
        encode_scans(init, Shards.open(shards), settings.inference())

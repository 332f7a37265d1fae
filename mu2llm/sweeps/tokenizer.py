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
from mu2llm.records import Checkpoint
from mu2llm.stages.job import check_parent
from mu2llm.sweeps.space import Space
from mu2llm.sweeps.sweep import Show, Sweep, run


def sweep(
    data: str, init: str, out: str, experiment: Experiment, resume: bool = False, show: Show | None = None
) -> dict[str, Any]:
    """Runs the sweep; what the command prints. Raises UserError before anything starts where it cannot work."""
    planned = plan(data, init, out, experiment)
    return run(planned, lambda: share(experiment, Shards.open(data), planned.init), resume, show)


def plan(data: str, init: str, out: str, experiment: Experiment) -> Sweep:
    """What would be swept; a UserError where data, checkpoint and space do not fit together."""
    shards, parent = Shards.open(data), open_checkpoint(init)
    if parent.lineage.stage != "contrastive":
        raise UserError(
            f"{init} is of stage {parent.lineage.stage}: its tokenizer has its shape already; a tokenizer sweep "
            "starts from a contrastive checkpoint"
        )
    if "kl" in experiment.sweep.objective:
        raise UserError("sweep.objective kl is a distance to a reference: it is for mu2llm sweep dpo")
    check_spec(shards, parent, experiment)
    check_parent(parent, experiment)
    check_cases(shards, experiment)
    space = Space.load("tokenizer", experiment)
    checksum = artefacts.digest([shards.checksum, parent.lineage.identity])
    return Sweep(
        kind="tokenizer",
        stage="sft",
        space=space,
        experiment=experiment,
        data=shards.uri,
        init=storage.absolute(init),
        shards=shards.uri,
        checksum=checksum,
        out=storage.absolute(out),
    )


def share(experiment: Experiment, shards: Shards, init: str) -> None:
    """The features of all scans, for all trials that train SFT from this checkpoint."""
    settings = experiment.sft
    if settings.freeze_vision and settings.cache_vision:
        encode_scans(init, shards, settings.inference())


def check_spec(shards: Shards, parent: Checkpoint, experiment: Experiment) -> None:
    """A UserError where shards, checkpoint and preset do not agree on how scans are prepared."""
    for what, given in (
        (f"preset {experiment.name}", experiment.data.spec.hash),
        (parent.uri, parent.lineage.spec_hash),
    ):
        if given != shards.spec.hash:
            raise UserError(
                f"{shards.uri} has spec {shards.spec.name} ({shards.spec.hash}), {what} expects {given}: name the "
                "preset that it was ingested with"
            )


def check_cases(shards: Shards, experiment: Experiment) -> None:
    """A UserError where there is nothing to measure trials on."""
    needed = {"validation", experiment.sweep.final_split} if experiment.sweep.final_seeds else {"validation"}
    for split in sorted(needed):
        if not shards.count(split):
            raise UserError(f"{shards.uri} has no rows in split {split}, on which a sweep measures its trials")

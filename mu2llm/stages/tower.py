"""A frozen vision tower by itself, before any stage: as a checkpoint, by which the cache of its features is known."""

from __future__ import annotations

import copy
import tempfile

from mu2llm import config, storage
from mu2llm.artefacts import Identity, publish
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.errors import UserError
from mu2llm.model import build_contrastive
from mu2llm.records import Checkpoint, Lineage
from mu2llm.stages.job import Job, new_job


def checkpoint(job: Job, shards: Shards) -> str:
    """The URI of the job's vision tower, below the shards' features. Made unless it is there; known by the tower's
    settings, its weights' content, the spec and, as what is not loaded is random, the seed."""
    experiment = job.resolved
    vision = {key: value for key, value in job.identity.inputs.items() if key.startswith("model.vision.")}
    digest = Identity.of({**vision, "spec": job.spec_hash, "seed": experiment.seed}).digest
    uri = storage.join(shards.uri, "features", f"tower-{digest}")
    if not storage.exists(storage.join(uri, Checkpoint.FILE)):
        model = build_contrastive(experiment.model, shards.spec, experiment.contrastive, 1, seed=experiment.seed)
        lineage = Lineage(
            stage="contrastive", spec_hash=job.spec_hash, seed=experiment.seed, tower=licensed(experiment)
        )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            publish(Checkpoint(uri=uri, experiment=job.experiment, lineage=lineage), folder)
    return uri


def of_weights(shards: Shards, weights: str, overrides: list[str]) -> str:
    """The checkpoint of published weights alone, of the tower that shards were ingested for, to be probed.

    `overrides` are `--set`'s. A UserError where the weights are not the tower's, or the shards have no configuration.
    """
    known = getattr(shards.index, "experiment", None)
    if known is None:
        raise UserError(f"{shards.uri} does not say what it was ingested for: ingest it again, or give --checkpoint")
    experiment = config.override(copy.deepcopy(known), [f"model.vision.weights={weights}", *overrides])
    return checkpoint(new_job("contrastive", shards, shards.uri, experiment), shards)


def licensed(experiment: Experiment) -> str:
    """An open tower's name and the licence of its weights, as the lineage keeps them; "" of m3d."""
    vision = experiment.model.vision
    return "" if vision.tower == "m3d" else f"{vision.spec.name} ({vision.spec.licence or 'licence not stated'})"

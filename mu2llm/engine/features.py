"""Each scan through a frozen vision encoder once: the features lie beside the shards and are read ever after."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import ActorPoolStrategy

from mu2llm import storage
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases import Shards, dataset, write_rows
from mu2llm.errors import UserError
from mu2llm.model import Mu2ForConditionalGeneration, Mu2ForContrastive, load

Encoder = Mu2ForConditionalGeneration | Mu2ForContrastive
COLUMNS = ["id", "report", "questions", "voxels", "chunk_mask"]
BATCH = 16


def encode_scans(
    checkpoint: str,
    shards: Shards,
    cpus: float = 1,
    gpus: float = 0,
    progress: Callable[[int, int], None] | None = None,
    actors: int | None = None,
) -> Shards:
    """A table with `features` (T, n, E) float16 in place of voxels, for all splits; made unless it is there.

    It lies at `<shards>/features/<digest of the vision weights>`: checkpoints with the same frozen vision, such
    as SFT's and DPO's after one contrastive stage, share it. Without `actors` there are as many as the cluster has
    room for. Raises UserError where the specs differ.
    """
    encoder = load_encoder(checkpoint)
    given = encoder.config.spec["name"] if encoder.config.spec else "none"
    if open_checkpoint(checkpoint).lineage.spec_hash != shards.spec.hash:
        raise UserError(
            f"{checkpoint} expects spec {given}, {shards.uri} has {shards.spec.name} ({shards.spec.hash}): "
            "ingest the scans with the checkpoint's preset"
        )
    uri = storage.join(shards.uri, "features", vision_digest(encoder))
    if storage.exists(storage.join(uri, "shards.json")):
        return Shards.open(uri)
    splits = [split for split in ("train", "validation", "test") if shards.count(split)]
    total, done = sum(shards.count(split) for split in splits), [0]

    def counted(rows: ray.data.Dataset) -> Iterator[dict[str, Any]]:
        for batch in rows.iter_batches(batch_size=BATCH, batch_format="numpy"):
            done[0] += len(batch["id"])
            if progress:
                progress(done[0], total)
            yield batch

    encoded = {split: counted(_encoded(checkpoint, shards, split, cpus, gpus, actors)) for split in splits}
    return write_rows(uri, encoded, shards, checkpoint=storage.lasting(checkpoint))


def cached_features(checkpoints: Collection[str], shards: Shards) -> str | None:
    """The table of features of the checkpoints' vision, if they share it and an earlier stage has cached them."""
    folder = storage.join(shards.uri, "features")
    if not storage.exists(folder):
        return None
    uris = {storage.join(folder, vision_digest(load_encoder(uri))) for uri in checkpoints}
    uri = uris.pop()
    return uri if not uris and storage.exists(storage.join(uri, "shards.json")) else None


def actor_pool(actors: int | None, batches: int) -> ActorPoolStrategy:
    """So many actors, or as many as the cluster has room for; never more than there are batches."""
    if actors:
        return ActorPoolStrategy(size=min(actors, batches))
    return ActorPoolStrategy(min_size=1, max_size=batches)


def _encoded(
    checkpoint: str, shards: Shards, split: str, cpus: float, gpus: float, actors: int | None
) -> ray.data.Dataset:
    return dataset(shards, split, COLUMNS).map_batches(
        VisionActor,
        fn_constructor_args=(checkpoint, cpus, gpus),
        batch_size=BATCH,
        batch_format="numpy",
        compute=actor_pool(actors, math.ceil(shards.count(split) / BATCH)),
        num_cpus=cpus,
        num_gpus=gpus,
    )


class VisionActor:
    """Holds the encoder in a Ray Data actor."""

    def __init__(self, checkpoint: str, cpus: float, gpus: float) -> None:
        torch.set_num_threads(max(1, int(cpus)))
        self.device = "cuda" if gpus else "cpu"
        self.encoder = load_encoder(checkpoint).to(self.device)  # type: ignore[arg-type]

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        voxels, mask = (torch.from_numpy(np.array(batch[name])).to(self.device) for name in ("voxels", "chunk_mask"))
        features = self.encoder.encode_vision(voxels, mask)
        kept = {name: batch[name] for name in ("id", "report", "questions", "chunk_mask")}
        return {**kept, "features": features.to(torch.float16).cpu().numpy()}


def load_encoder(uri: str) -> Encoder:
    """The model of a checkpoint of any stage, in evaluation mode: for its `encode_vision`."""
    if open_checkpoint(uri).lineage.stage != "contrastive":
        return load(uri)[0]
    with storage.local_copy(uri) as folder:
        return Mu2ForContrastive.from_pretrained(folder).eval()


def vision_digest(encoder: Encoder) -> str:
    """Sixteen hex digits over the vision encoder's weights, running statistics and what else decides its features."""
    vision = encoder.vision if isinstance(encoder, Mu2ForContrastive) else encoder.model.vision
    settings = encoder.config.vision
    digest = hashlib.sha256(f"pooling {settings.pooling} heads {settings.num_heads}".encode())
    for name, tensor in sorted(vision.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

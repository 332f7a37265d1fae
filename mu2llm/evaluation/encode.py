"""Each scan through a frozen vision encoder once: the features lie beside the shards and are read ever after."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import ActorPoolStrategy

from mu2llm import storage
from mu2llm.cases import Shards, dataset, write_rows
from mu2llm.errors import UserError
from mu2llm.model import Mu2ForConditionalGeneration, Mu2ForContrastive, load
from mu2llm.records import Checkpoint

Encoder = Mu2ForConditionalGeneration | Mu2ForContrastive
COLUMNS = ["id", "report", "questions", "voxels", "chunk_mask"]
BATCH = 16


def encode_scans(
    checkpoint: str,
    shards: Shards,
    cpus: float = 1,
    gpus: float = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Shards:
    """A table with `features` (T, n, E) float16 in place of voxels, for all splits; made unless it is there.

    It lies at `<shards>/features/<digest of the vision weights>`: checkpoints with the same frozen vision, such
    as SFT's and DPO's after one contrastive stage, share it. Raises UserError where the specs differ.
    """
    encoder = load_encoder(checkpoint)
    given = encoder.config.spec["name"] if encoder.config.spec else "none"
    if Checkpoint.open(checkpoint).lineage.spec_hash != shards.spec.hash:
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

    encoded = {split: counted(_encoded(checkpoint, shards, split, cpus, gpus)) for split in splits}
    return write_rows(uri, encoded, shards, checkpoint=storage.lasting(checkpoint))


def _encoded(checkpoint: str, shards: Shards, split: str, cpus: float, gpus: float) -> ray.data.Dataset:
    return dataset(shards, split, COLUMNS).map_batches(
        VisionActor,
        fn_constructor_args=(checkpoint, cpus, gpus),
        batch_size=BATCH,
        batch_format="numpy",
        compute=ActorPoolStrategy(size=1),
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
    if Checkpoint.open(uri).lineage.stage != "contrastive":
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

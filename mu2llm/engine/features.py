"""Each scan through a frozen vision encoder once: the features lie beside the shards and are read ever after."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mu2llm import logs, storage
from mu2llm.artefacts import Identity, open_checkpoint, weights_of
from mu2llm.cases import Shards, splits_dataset, write_rows
from mu2llm.cases.shards import begun, read_rows
from mu2llm.engine.actors import failures, on_actors, use_cpus
from mu2llm.engine.loading import load_encoder, numerics
from mu2llm.errors import Failure, UserError
from mu2llm.progress import Counted
from mu2llm.settings.inference import InferenceConfig, Precision

COLUMNS = ["id", "report", "questions", "voxels", "chunk_mask"]
BATCH = 16  # scans


def encode_scans(checkpoint: str, shards: Shards, settings: InferenceConfig, progress: Counted | None = None) -> Shards:
    """A table with `features` (T, n, E) float16 in place of voxels, for all splits; made unless it is there, from where
    a run that was stopped had come to.

    It lies at `<shards>/features/<digest of scans and vision weights>`: checkpoints with the same frozen vision, such
    as SFT's and DPO's after one contrastive stage, share it. `progress` is told (scans done, scans in all).
    Raises UserError where the specs differ.
    """
    expected = open_checkpoint(checkpoint)
    if expected.lineage.spec_hash != shards.spec.hash:
        raise UserError(
            f"{checkpoint} expects spec {expected.spec_title}, {shards.uri} has {shards.spec.title}: "
            "ingest the scans with the checkpoint's preset"
        )
    uri = features_uri(checkpoint, shards, settings.used_precision)
    if storage.exists(storage.join(uri, "shards.json")):
        return Shards.open(uri)
    splits = [split for split in ("train", "validation", "test") if shards.count(split)]
    kept = begun(uri, splits, shards)
    done = sum(len(ids) for files in kept.values() for _, ids in files)
    with failures("encoding scans", "run again to go on"):
        encoded = groupby(_encoded(checkpoint, shards, splits, settings, done, progress), key=itemgetter(0))
        tables = ((split, (batch for _, batch in batches)) for split, batches in encoded)
        return write_rows(uri, tables, shards, kept=kept, checkpoint=storage.lasting(checkpoint))


def cached_features(checkpoints: Collection[str], shards: Shards, precision: Precision = "fp32") -> str | None:
    """The table of features of the checkpoints' vision, if they share it and an earlier stage has cached them."""
    if not storage.exists(storage.join(shards.uri, "features")):
        return None
    uris = {features_uri(uri, shards, precision) for uri in checkpoints}
    uri = uris.pop()
    return uri if not uris and storage.exists(storage.join(uri, "shards.json")) else None


def scan_features(model: Any, rows: Mapping[str, Any], precision: Precision = "fp32") -> tuple[Tensor, Tensor]:
    """Rows of shards (`voxels`) or of their cached features (`features`), B of them, with `chunk_mask` → vision
    features (B, T, n, E) and chunk mask (B, T) on the model's device."""
    cached = "features" in rows
    scans, mask = (
        torch.from_numpy(np.array(rows[name])).to(model.device)
        for name in ("features" if cached else "voxels", "chunk_mask")
    )
    with numerics(model.device, precision):
        return scans.to(model.dtype) if cached else model.encode_vision(scans, mask), mask


def read_scans(
    model: Any, shards: Shards, split: str, rows: np.ndarray, precision: Precision = "fp32"
) -> tuple[Tensor, Tensor]:
    """`scan_features` of B rows of a split, read here."""
    scan = "features" if "features" in shards.schema(split).names else "voxels"
    read = read_rows(shards.files(split), shards.rows(split), ["chunk_mask", scan], rows)
    return scan_features(model, read, precision)


def features_uri(checkpoint: str, shards: Shards, precision: Precision = "fp32") -> str:
    """Where the features of a checkpoint's vision lie: not those of other weights, of another rounding, nor of what the
    shards were once."""
    inputs = {"data": shards.checksum, "vision": weights_of(open_checkpoint(checkpoint)).vision}
    inputs |= {} if precision == "fp32" else {"precision": precision}
    return storage.join(shards.uri, "features", Identity.of(inputs).digest)


def _encoded(
    checkpoint: str,
    shards: Shards,
    splits: Sequence[str],
    settings: InferenceConfig,
    done: int,
    progress: Counted | None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Batches of one split after the other, all through the same actors, behind the first `done` scans."""
    split_of = {case.id: split for split in splits for case in shards.cases(split)}
    if done == len(split_of):
        return
    rows = splits_dataset(shards, splits, COLUMNS, done)
    rows = on_actors(rows, VisionActor, (checkpoint, settings), settings, len(split_of) - done)
    for batch in rows.iter_batches(batch_size=BATCH, batch_format="numpy"):
        owners = enumerate(split_of[name] for name in batch["id"])
        for split, group in groupby(owners, key=itemgetter(1)):
            chosen = [i for i, _ in group]
            yield split, {name: values[chosen] for name, values in batch.items()}
        done += len(batch["id"])
        if progress:
            progress(done, len(split_of))


class VisionActor:
    """Holds the encoder in a Ray Data actor."""

    def __init__(self, checkpoint: str, settings: InferenceConfig) -> None:
        logs.begin(stage="encode")
        use_cpus(settings)
        self.precision = settings.used_precision
        self.encoder = load_encoder(checkpoint, self.precision, settings.used_device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        features, _ = scan_features(self.encoder, batch, self.precision)
        stored = features.to(torch.float16)
        if not stored.isfinite().all():
            raise Failure(
                f"features of {batch['id'][0]} or a scan beside it reach {float(features.abs().max()):.3g}, more than "
                "float16 holds: with another tower or other weights they do not, see mu2llm towers check"
            )
        kept = {name: batch[name] for name in ("id", "report", "questions", "chunk_mask")}
        return {**kept, "features": stored.cpu().numpy()}

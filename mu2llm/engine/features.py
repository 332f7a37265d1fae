"""Each scan through a frozen vision encoder once: the features lie beside the shards and are read ever after.

The actors that hold the encoder read the scans and write the features themselves, a file at a time: those of CT-RATE
are 160 GB at the paper's size, too much to pass through one driver. A file that is there is done.
"""

from __future__ import annotations

import collections
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import ray.data
import torch
from torch import Tensor

from mu2llm import logs, storage
from mu2llm.artefacts import Identity, open_checkpoint, weights_of
from mu2llm.cases import Shards
from mu2llm.cases.shards import ShardFile, read_rows, read_summary, shard_file, write_derived, write_file
from mu2llm.engine.actors import failures, resources, use_cpus
from mu2llm.engine.loading import load_encoder, numerics
from mu2llm.errors import Failure, UserError
from mu2llm.progress import Counted
from mu2llm.settings.inference import InferenceConfig, Precision

COLUMNS = ["id", "report", "questions", "voxels", "chunk_mask"]
FILE_SCANS = 64  # of one file of features; what of it is encoded is lost where an actor dies
READ_AHEAD = 2  # batches that an actor reads while it encodes one
PART = ("split", "first", "end")


class Part(NamedTuple):
    """The rows of a split, from `first` to before `end`, whose features are one file."""

    split: str
    first: int
    end: int

    @property
    def name(self) -> str:
        """How its files begin, below the split; a run's own name follows, as readers keep files open by name."""
        return f"{self.first:07d}-"


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
    counts = {split: shards.count(split) for split in ("train", "validation", "test") if shards.count(split)}
    files = _finished(uri, shards, counts)
    done = sum(file.rows for file in files.values())
    parts = [each for split, count in counts.items() for each in _parts(split, count)]
    with failures("encoding scans", "run again to go on"):
        for part, file in _encoded(checkpoint, shards, uri, [each for each in parts if each not in files], settings):
            files[part] = file
            done += file.rows
            if progress:
                progress(done, sum(counts.values()))
    by_split = {split: [files[each] for each in parts if each.split == split] for split in counts}
    return write_derived(uri, by_split, shards, checkpoint=storage.lasting(checkpoint))


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


def _parts(split: str, count: int) -> list[Part]:
    return [Part(split, first, min(first + FILE_SCANS, count)) for first in range(0, count, FILE_SCANS)]


def _finished(uri: str, shards: Shards, counts: Mapping[str, int]) -> dict[Part, ShardFile]:
    """The files of features that are there whole, of the scans that the parts have now."""
    found: dict[Part, ShardFile] = {}
    for split, count in counts.items():
        names = [info.base_name for info in storage.list_files(storage.join(uri, split))]
        parts = {each.name: each for each in _parts(split, count)}
        there = [(parts[name[:8]], f"{split}/{name}") for name in names if name[:8] in parts]
        ids = shards.ids(split) if there else []
        with ThreadPoolExecutor(storage.REQUESTS) as pool:
            summaries = pool.map(lambda each: read_summary(storage.join(uri, each[1])), there)
            whole = [each for each, its in zip(there, summaries, strict=True) if its["ids"] == ids[slice(*each[0][1:])]]
            files = pool.map(lambda each: shard_file(uri, each[1]), whole)
            found |= {part: file for (part, _), file in zip(whole, files, strict=True)}
    return found


def _encoded(
    checkpoint: str, shards: Shards, uri: str, parts: Sequence[Part], settings: InferenceConfig
) -> Iterator[tuple[Part, ShardFile]]:
    """The files of the parts as the actors finish them."""
    if not parts:
        return
    rows = ray.data.from_items([dict(zip(PART, each, strict=True)) for each in parts], override_num_blocks=len(parts))
    rows.context.raise_original_map_exception = True
    encoded = rows.map_batches(
        VisionActor,
        fn_constructor_args=(checkpoint, settings, shards, uri, secrets.token_hex(4)),
        batch_size=1,
        **resources(settings, len(parts)),
    )
    for batch in encoded.iter_batches(batch_size=None, batch_format="numpy"):
        for split, first, end, file in zip(*(batch[name] for name in (*PART, "file")), strict=True):
            yield Part(str(split), int(first), int(end)), ShardFile.model_validate_json(file)


class VisionActor:
    """Holds the encoder in a Ray Data actor: parts of the shards → the files of their features."""

    def __init__(self, checkpoint: str, settings: InferenceConfig, shards: Shards, uri: str, run: str) -> None:
        logs.begin(stage="encode")
        use_cpus(settings)
        self.shards, self.uri, self.run = shards, uri, run
        self.batch_size, self.precision = settings.batch_size, settings.used_precision
        self.encoder = load_encoder(checkpoint, self.precision, settings.used_device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        files = []
        for split, first, end in zip(*(batch[name] for name in PART), strict=True):
            part = Part(str(split), int(first), int(end))
            path = f"{part.split}/{part.name}{self.run}.parquet"
            file = write_file(self.uri, path, map(self.encode, self._read(part)))
            files.append(file.model_dump_json())
        return {**batch, "file": np.array(files, dtype=object)}

    def _read(self, part: Part) -> Iterator[dict[str, Any]]:
        """Batches of a part's rows; the next ones are read meanwhile."""
        files, counts = self.shards.files(part.split), self.shards.rows(part.split)
        firsts = range(part.first, part.end, self.batch_size)
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            ahead: collections.deque[Any] = collections.deque()
            for first in firsts:
                rows = np.arange(first, min(first + self.batch_size, part.end))
                ahead.append(pool.submit(read_rows, files, counts, COLUMNS, rows))
                if len(ahead) > READ_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def encode(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Rows of shards with `features` (B, T, n, E) float16 in place of voxels; Failure where they do not fit."""
        features, _ = scan_features(self.encoder, rows, self.precision)
        stored = features.to(torch.float16)
        if not stored.isfinite().all():
            raise Failure(
                f"features of {rows['id'][0]} or a scan beside it reach {float(features.abs().max()):.3g}, more than "
                "float16 holds: with another tower or other weights they do not, see mu2llm towers check"
            )
        kept = {name: rows[name] for name in ("id", "report", "questions", "chunk_mask")}
        return {**kept, "features": stored.cpu().numpy()}

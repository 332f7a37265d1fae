"""A scan as a model took it, kept beside the corrections of its report: its voxels and their mask, in the form of a
shard's row, and nothing of whose they are."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mu2llm import storage
from mu2llm.cases import tensors
from mu2llm.cases.shards import SUMMARY, ShardWriter

FOLDER = "inputs"  # beside the corrections


@dataclass(frozen=True)
class KeptInput:
    """Voxels (T, C, K, H, W) and chunk mask (T,), prepared by the spec of this hash."""

    voxels: np.ndarray
    chunk_mask: np.ndarray
    spec_hash: str


def place(corrections: str, report_id: str) -> str:
    """Where it lies for the corrections of a report in the folder `corrections`."""
    return storage.join(corrections, FOLDER, f"{report_id}.parquet")


def write(uri: str, kept: KeptInput) -> None:
    """Writes it, whole."""
    row = {"voxels": kept.voxels[None], "chunk_mask": kept.chunk_mask[None]}
    with storage.staged(uri) as local, ShardWriter(local, tensors.schema_of(row)) as writer:
        writer.write(row)
        writer.summarise(spec_hash=kept.spec_hash)


def parse(data: bytes) -> KeptInput:
    """A file's bytes; a ValueError says why they are none."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        row = tensors.decode(file.read(use_threads=False), file.schema_arrow)
        summary = json.loads(file.metadata.metadata[SUMMARY])
        return KeptInput(row["voxels"][0], row["chunk_mask"][0], str(summary["spec_hash"]))
    except (OSError, KeyError, TypeError, IndexError) as error:
        raise ValueError(str(error)) from error

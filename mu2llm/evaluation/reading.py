"""What the reading tasks of `generate` do: rows of shards → scans. Without torch, which costs a task seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mu2llm.cases import Shards
from mu2llm.cases.shards import read_rows


@dataclass(frozen=True)
class Reader:
    """Reads batches of the ring: the batch's cases, and behind them the next one for its scan alone."""

    files: list[str]
    counts: list[int]
    order: np.ndarray
    batch_size: int
    scan: str

    @classmethod
    def of(cls, shards: Shards, split: str, order: np.ndarray, batch_size: int) -> Reader:
        """For shards with `voxels`, or for a table with their `features`."""
        scan = "features" if "features" in shards.schema(split).names else "voxels"
        return cls(shards.files(split), shards.rows(split), order, batch_size, scan)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        number = int(batch["batch"][0])
        places = np.arange(number * self.batch_size, min((number + 1) * self.batch_size, len(self.order)) + 1)
        rows = self.order[places % len(self.order)]
        columns = read_rows(self.files, self.counts, ["id", "questions", "chunk_mask", self.scan], rows)
        return {**columns, "batch": np.full(len(rows), number)}

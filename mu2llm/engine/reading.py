"""What the reading tasks of `generate` do: rows of shards → scans. Without torch, which costs a task seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from mu2llm.cases import Shards
from mu2llm.cases.shards import read_rows


@dataclass(frozen=True)
class CaseReader:
    """Reads runs of the ring, from `first` to before `end`: their cases, and the next one's scan alone behind them."""

    files: list[str]
    counts: list[int]
    order: np.ndarray
    scan: str

    @classmethod
    def of(cls, shards: Shards, split: str, order: np.ndarray) -> Self:
        """For shards with `voxels`, or for a table with their `features`."""
        scan = "features" if "features" in shards.schema(split).names else "voxels"
        return cls(shards.files(split), shards.rows(split), order, scan)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        first, end = int(batch["first"][0]), int(batch["end"][0])
        rows = self.order[np.arange(first, end + 1) % len(self.order)]
        columns = read_rows(self.files, self.counts, ["id", "questions", "chunk_mask", self.scan], rows)
        return {**columns, "first": np.full(len(rows), first)}

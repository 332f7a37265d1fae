"""Streams: rows of shards in a deterministic order, read ahead by Ray Data, for one training worker of many.

The global order of all epochs is a function of (seed, epoch) alone. Global batch s is order[s·B : (s+1)·B] and each
worker takes its contiguous part of it, so a run may stop at any row and go on with any number of workers.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import TaskPoolStrategy

from mu2llm.cases.shards import Shards, read_rows
from mu2llm.errors import UserError

BLOCK_BYTES = 16 * 2**20  # what one step of a reading task gives; large enough to hide Ray Data's cost a block
TASK_BYTES = 128 * 2**20  # what one reading task gives before the next is scheduled
MAX_TASKS = 4096
READING_TASKS = 2  # at once, of one stream


@functools.lru_cache(maxsize=4)
def permutation(count: int, seed: int | None, epoch: int, neighbours: int) -> np.ndarray:
    """The order of `count` rows in an epoch; runs of `neighbours` rows stay together. No seed: as stored."""
    if seed is None:
        return np.arange(count)
    runs = np.random.default_rng((seed, epoch)).permutation(-(-count // neighbours))
    rows = (runs[:, None] * neighbours + np.arange(neighbours)).ravel()
    return rows[rows < count]


@dataclass(frozen=True)
class Order:
    """The global order over all epochs."""

    count: int
    seed: int | None
    neighbours: int = 1

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the order (any number of epochs long) → rows of the split."""
        epochs, places = np.divmod(positions, self.count)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permutation(self.count, self.seed, int(epoch), self.neighbours)[places[here]]
        return rows


@dataclass(frozen=True)
class Share:
    """The positions that one rank consumes of those from `start` to `stop`, in global batches of `batch_size`."""

    start: int
    stop: int
    batch_size: int
    rank: int = 0
    world: int = 1

    def _part(self, size: int) -> tuple[int, int]:
        return self.rank * size // self.world, (self.rank + 1) * size // self.world

    @property
    def local_batch(self) -> int:
        low, high = self._part(self.batch_size)
        return high - low

    def __len__(self) -> int:
        full, rest = divmod(max(0, self.stop - self.start), self.batch_size)
        low, high = self._part(rest)
        return full * self.local_batch + high - low

    def positions(self, first: int, last: int) -> np.ndarray:
        """Global positions of this rank's rows number `first` to `last`."""
        full = (self.stop - self.start) // self.batch_size
        steps, offsets = np.divmod(np.arange(first, min(last, len(self))), self.local_batch)
        tail = (self.stop - self.start) % self.batch_size
        lows = np.where(steps < full, self._part(self.batch_size)[0], self._part(tail)[0])
        return self.start + steps * self.batch_size + lows + offsets


@dataclass(frozen=True)
class Reader:
    """What a reading task does: numbers of blocks → their rows."""

    files: list[str]
    counts: list[int]
    columns: list[str]
    order: Order
    share: Share
    block_rows: int

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for block in batch["id"].tolist():
            positions = self.share.positions(block * self.block_rows, (block + 1) * self.block_rows)
            columns = read_rows(self.files, self.counts, self.columns, self.order.rows(positions))
            yield {**columns, "row": positions}


def blocks(
    shards: Shards, split: str, columns: list[str], order: Order, share: Share, num_cpus: float
) -> ray.data.Dataset:
    """A Dataset of the rows of a share in order, in small blocks, with the column `row` (position in the order)."""
    schema = shards.schema(split)
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise UserError(f"{shards.uri}: no column {', '.join(missing)}; there are {', '.join(schema.names)}")
    row_bytes = sum(_width(schema.field(name)) for name in columns)
    block_rows = max(1, BLOCK_BYTES // row_bytes)
    if block_rows > share.local_batch:
        block_rows -= block_rows % share.local_batch
    number = -(-len(share) // block_rows)
    per_task = max(1, TASK_BYTES // (block_rows * row_bytes), -(-number // MAX_TASKS))
    tasks = max(1, -(-number // per_task))
    dataset = ray.data.range(number, override_num_blocks=tasks)
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = int(0.9 * block_rows * row_bytes)  # so that each step gives a block
    reader = Reader(shards.files(split), shards.rows(split), columns, order, share, block_rows)
    return dataset.map_batches(
        reader,
        batch_size=None,
        batch_format="numpy",
        num_cpus=num_cpus,
        compute=TaskPoolStrategy(size=min(READING_TASKS, tasks)),
    )


def _width(field: pa.Field) -> int:
    return field.type.byte_width if pa.types.is_fixed_size_binary(field.type) else 1024


def dataset(shards: Shards, split: str, columns: list[str], num_cpus: float = 0.25) -> ray.data.Dataset:
    """All rows of a split once, as stored, as a Dataset: tensors as arrays, JSON columns as JSON text."""
    count = shards.count(split)
    return blocks(shards, split, columns, Order(count, None), Share(0, count, 1), num_cpus)


class Stream:
    """Batches for rank `rank` of `world`: dicts of arrays (tensors as (b, …), text as lists) in the global order.

    `rows` is where the stream ends (default: one epoch), `start_row` where it starts; both count rows of all
    workers over all epochs. Each batch has `row`, the rows' global positions. Without a seed rows come as stored.
    The last batch may be smaller. JSON columns come as JSON text. `wait_seconds` is how long the consumer waited.
    """

    def __init__(
        self,
        shards: Shards,
        split: str,
        columns: list[str],
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
        start_row: int = 0,
        rows: int | None = None,
        shuffle_rows: int = 1,
        num_cpus: float = 0.25,
    ) -> None:
        if batch_size < world:
            raise UserError(f"a batch of {batch_size} cannot be shared by {world} workers; raise batch_size")
        self.share = Share(start_row, shards.count(split) if rows is None else rows, batch_size, rank, world)
        self.wait_seconds = 0.0
        order = Order(shards.count(split), seed, shuffle_rows)
        self._dataset = blocks(shards, split, columns, order, self.share, num_cpus)

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self.share) // self.share.local_batch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        asked = time.perf_counter()
        for batch in self._dataset.iter_batches(
            batch_size=self.share.local_batch, batch_format="numpy", prefetch_batches=2
        ):
            ready = {name: _usable(values) for name, values in batch.items()}
            self.wait_seconds += time.perf_counter() - asked
            yield ready
            asked = time.perf_counter()


def _usable(values: np.ndarray) -> np.ndarray | list[Any]:
    """Text as a list; tensors as arrays of their own, which outlive the object store's and may be written to."""
    return values.tolist() if values.dtype == object else np.array(values)

"""Streams: rows of shards in a deterministic order, read ahead by Ray Data, for one training worker of many.

The global order of all epochs is a function of (seed, epoch) alone. Global batch s is order[s·B : (s+1)·B] and each
worker takes its contiguous part of it, so a run may stop at any row and go on with any number of workers.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources, TaskPoolStrategy

from mu2llm import private_apis, storage
from mu2llm.cases import tensors
from mu2llm.cases.shards import Shards, read_rows
from mu2llm.errors import UserError

BLOCK_BYTES = 16 * 2**20  # what one step of a reading task gives; large enough to hide Ray Data's cost a block
TASK_BYTES = 128 * 2**20  # what one reading task gives before the next is scheduled
MAX_TASKS = 4096
CPUS_A_READER = 8  # of the cluster, for each task that reads at the same time
LEAST_READERS = 2  # at once, of one stream
ROWS_AT_ONCE = 8  # that a reading task fetches from object storage at once, where a row is as large as a block
AHEAD_BATCHES, AHEAD_BLOCKS = 8, 8  # of a worker, and of each of its reading tasks, that may wait in the object store
READING_CPUS = 0.0  # that Ray counts for each: training workers may hold all there are, and reading mostly waits
TEXT_BYTES = 1024
WINDOW_BATCHES = 32  # of one window, within which rows of similar lengths come together


@functools.lru_cache(maxsize=4)
def permutation(count: int, seed: int | None, epoch: int, run_length: int) -> np.ndarray:
    """The order of `count` items in an epoch; runs of `run_length` items stay together. No seed: as stored."""
    if seed is None:
        return np.arange(count)
    runs = np.random.default_rng((seed, epoch)).permutation(-(-count // run_length))
    items = (runs[:, None] * run_length + np.arange(run_length)).ravel()
    return items[items < count]


def group_by_length(items: np.ndarray, lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """The same items in batches of similar lengths: sorted within windows of batches, whose order is random again."""
    grouped = []
    for start in range(0, len(items), WINDOW_BATCHES * batch_size):
        window = items[start : start + WINDOW_BATCHES * batch_size]
        window = window[np.argsort(lengths[window], kind="stable")]
        whole = len(window) - len(window) % batch_size
        grouped += [rng.permutation(window[:whole].reshape(-1, batch_size)).ravel(), window[whole:]]
    return np.concatenate(grouped)


@dataclass(frozen=True)
class Order:
    """The global order over all epochs of `count` items; with their `lengths` in batches of similar ones."""

    count: int
    seed: int | None
    run_length: int = 1
    lengths: np.ndarray | None = None
    batch_size: int = 1

    def items(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the order (any number of epochs long) → items."""
        epochs, places = np.divmod(positions, self.count)
        items = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            items[here] = self.epoch(int(epoch))[places[here]]
        return items

    def epoch(self, epoch: int) -> np.ndarray:
        """The items of an epoch in order."""
        items = permutation(self.count, self.seed, epoch, self.run_length)
        if self.lengths is None:
            return items
        return group_by_length(items, self.lengths, self.batch_size, np.random.default_rng((self.seed or 0, epoch, 1)))


@dataclass(frozen=True)
class WorkerRows:
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
class Source:
    """Where the items of an order lie: files, the rows of each, the columns wanted, and the row of each item (none:
    the items are the rows)."""

    files: list[str]
    counts: list[int]
    schema: pa.Schema
    rows: np.ndarray | None

    @classmethod
    def of(cls, shards: Shards, split: str, columns: list[str], ids: Sequence[str] | None) -> Self:
        """A UserError names columns and ids that are not there."""
        schema = shards.schema(split)
        missing = [name for name in columns if name not in schema.names]
        if missing:
            raise UserError(f"{shards.uri}: no column {', '.join(missing)}; there are {', '.join(schema.names)}")
        rows = None if ids is None else shards.rows_of(split, ids)
        return cls(shards.files(split), shards.rows(split), pa.schema([schema.field(name) for name in columns]), rows)

    @property
    def count(self) -> int:
        return sum(self.counts) if self.rows is None else len(self.rows)

    @property
    def remote(self) -> bool:
        """Whether the files lie in object storage."""
        return storage.is_remote(self.files[0])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; of a text an estimate."""
        return sum(field.type.byte_width if tensors.is_tensor(field) else TEXT_BYTES for field in self.schema)

    def read(self, items: np.ndarray) -> dict[str, np.ndarray]:
        rows = items if self.rows is None else self.rows[items]
        return read_rows(self.files, self.counts, self.schema.names, rows)


@dataclass(frozen=True)
class ReadBlocks:
    """What a reading task does: a range of blocks → their rows, read `together` blocks at a time."""

    source: Source
    order: Order
    own: WorkerRows
    block_rows: int
    together: int = 1

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        end = batch["end"].item()
        for first in range(batch["first"].item(), end, self.together):
            last = min(first + self.together, end)
            positions = self.own.positions(first * self.block_rows, last * self.block_rows)
            items = self.order.items(positions)
            rows = {**self.source.read(items), "row": positions, "item": items}
            for at in range(0, len(items), self.block_rows):
                yield {name: values[at : at + self.block_rows] for name, values in rows.items()}


def reading_tasks(workers: int = 1) -> int:
    """How many tasks read at once for each of so many workers that share the cluster; for one, for the whole of it."""
    return max(LEAST_READERS, int(ray.cluster_resources().get("CPU", 0)) // CPUS_A_READER // workers)


def room_ahead(batch_bytes: int, block_bytes: int, readers: int, workers: int) -> float:
    """Bytes of the object store that a worker's stream may fill: what hides the jitter of its readers, and no more than
    its share of the half that Ray Data would give to each stream alone."""
    wanted = AHEAD_BATCHES * batch_bytes + AHEAD_BLOCKS * readers * block_bytes
    return min(wanted, ray.cluster_resources().get("object_store_memory", 0) / 2 / workers)


def blocks(source: Source, order: Order, own: WorkerRows, num_cpus: float, alone: bool) -> ray.data.Dataset:
    """The rows of one worker in order, in small blocks, with `row` (position in the order) and `item`. If it is not
    `alone` on the cluster, it leaves the others' streams their room."""
    block_rows = max(1, BLOCK_BYTES // source.row_bytes)
    if block_rows > own.local_batch:
        block_rows -= block_rows % own.local_batch
    together = max(1, ROWS_AT_ONCE // block_rows) if source.remote else 1
    block_bytes = block_rows * source.row_bytes
    number = -(-len(own) // block_rows)
    a_task = max(together, TASK_BYTES // block_bytes, -(-number // MAX_TASKS))
    tasks = [{"first": at, "end": min(at + a_task, number)} for at in range(0, max(number, 1), a_task)]
    # from_items makes its blocks here; from_arrow asks a task for them, which waits for ever where no CPU is free.
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    readers = min(reading_tasks(own.world), len(tasks))
    options = dataset.context.execution_options
    options.preserve_order = True
    if not alone:
        room = room_ahead(own.local_batch * source.row_bytes, block_bytes, readers, own.world)
        options.resource_limits = ExecutionResources.for_limits(object_store_memory=room)
    private_apis.pause_scheduler(dataset)
    dataset.context.target_max_block_size = int(0.9 * block_bytes)  # so that each step of a task gives a block
    return dataset.map_batches(
        ReadBlocks(source, order, own, block_rows, together),
        batch_size=None,
        batch_format="numpy",
        num_cpus=num_cpus,
        compute=TaskPoolStrategy(size=readers),
    )


def dataset(
    shards: Shards,
    split: str,
    columns: list[str],
    ids: Sequence[str] | None = None,
    num_cpus: float = READING_CPUS,
) -> ray.data.Dataset:
    """All rows of a split once, as stored, or those of `ids` in their order, as a Dataset.

    Tensors are arrays, JSON columns JSON text; `item` is the row's number in the split, or its place in `ids`.
    """
    source = Source.of(shards, split, columns, ids)
    return blocks(source, Order(source.count, None), WorkerRows(0, source.count, 1), num_cpus, alone=True)


class Stream:
    """Batches for rank `rank` of `world`: dicts of arrays (tensors as (b, …), text as lists) in the global order.

    The order is over the rows of a split, or over `ids` of its cases, which may name a case several times. `rows` is
    where the stream ends (default: one epoch), `start_row` where it starts; both count rows of all workers over all
    epochs. Runs of `shuffle_rows` rows stay together. Without a seed the order is as stored. Each batch has
    `row` (positions in the global order) and `item` (number in the split, or place in `ids`). The last batch may be
    smaller. JSON columns come as JSON text. `lengths` of the items make batches of similar ones. `wait_seconds` is how
    long the consumer waited for data.
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
        ids: Sequence[str] | None = None,
        lengths: Sequence[int] | None = None,
        num_cpus: float = READING_CPUS,
    ) -> None:
        if batch_size < world:
            raise UserError(f"a batch of {batch_size} cannot be shared by {world} workers; raise batch_size")
        source = Source.of(shards, split, columns, ids)
        self.own = WorkerRows(start_row, source.count if rows is None else rows, batch_size, rank, world)
        self.wait_seconds = 0.0
        known_lengths = None if lengths is None else np.asarray(lengths)
        order = Order(source.count, seed, shuffle_rows, known_lengths, batch_size)
        self._dataset = blocks(source, order, self.own, num_cpus, alone=False)

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self.own) // self.own.local_batch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not len(self):
            return
        asked = time.perf_counter()
        for batch in self._dataset.iter_batches(
            batch_size=self.own.local_batch, batch_format="numpy", prefetch_batches=2
        ):
            ready = {name: _usable(values) for name, values in batch.items()}
            self.wait_seconds += time.perf_counter() - asked
            yield ready
            asked = time.perf_counter()


def _usable(values: np.ndarray) -> np.ndarray | list[Any]:
    """Text as a list; tensors as arrays of their own, which outlive the object store's and may be written to."""
    return values.tolist() if values.dtype == object else np.array(values)

"""Reports for many cases on Ray Data: readers feed actors that hold the checkpoints.

The cases stand in a ring in which each one's neighbour is another patient; "shuffled" is the neighbour's scan, so a
batch needs but one scan more than it has cases, and each scan is encoded once for all that is asked about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import TaskPoolStrategy

from mu2llm import storage
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases import Shards
from mu2llm.cases.stream import reading_tasks
from mu2llm.engine.actors import failures, resources
from mu2llm.engine.predictions import Prediction, Request
from mu2llm.engine.reading import CaseReader
from mu2llm.engine.writer import Writer
from mu2llm.errors import UserError
from mu2llm.progress import Counted

_FILE = re.compile(r"(\d+)-(\d+)\.parquet")


def generate(request: Request, state: str | None = None, progress: Counted | None = None) -> list[Prediction]:
    """Writes all that is requested; the cases in the order of the shards.

    With `state` (a URI) finished cases are kept there and an interrupted request goes on, also with another batch
    size. Raises UserError where a checkpoint cannot write, or expects another preprocessing than the shards have.
    """
    meant = _Meant.of(request)
    if state:
        return [each for part in parts(request, state, max(1, len(meant.cases)), progress) for each in part]
    return meant.predictions([table for _, _, table in _written(meant, range(len(meant.cases)), progress)])


def parts(request: Request, state: str, size: int, progress: Counted | None = None) -> Iterator[list[Prediction]]:
    """What `generate` gives, so many cases at a time, as it does not fit into memory for CT-RATE.

    The cases of a part are neighbours in the ring, in the order of the shards: neither batch size nor interruptions
    decide which. All are written before the first part is given.
    """
    meant, folder = _Meant.of(request), storage.join(state, request.identity.digest)
    files = _finished(folder)
    done = {place for first, end in files for place in range(first, end)}
    for first, end, table in _written(meant, [i for i in range(len(meant.cases)) if i not in done], progress):
        files[first, end] = storage.join(folder, f"{first:06d}-{end:06d}.parquet")
        storage.write_table(files[first, end], table)
    for start in range(0, len(meant.cases), size):
        stop = start + size
        tables = [storage.read_table(uri) for (first, end), uri in files.items() if first < stop and end > start]
        yield meant.predictions(tables, start, stop)


@dataclass(frozen=True)
class _Meant:
    """A request with the cases that it is about (of each its id and whose it is), and their places in the ring."""

    request: Request
    shards: Shards
    cases: list[str]
    patients: list[str]
    order: np.ndarray

    @classmethod
    def of(cls, request: Request) -> _Meant:
        shards = checked(request)
        rows, ids, patients = request.rows(shards), shards.ids(request.split), shards.patients(request.split)
        whose = [patients[row] for row in rows]
        return cls(request, shards, [ids[row] for row in rows], whose, ring(whose, request.decoding.seed))

    def predictions(self, tables: Sequence[pa.Table], first: int = 0, end: int | None = None) -> list[Prediction]:
        """Those of the cases at these places, run by run in the order of the shards."""
        place = {self.cases[i]: int(i) for i in self.order[first:end]}
        checkpoints = list(self.request.checkpoints)
        rows = [row for table in tables for row in table.to_pylist() if row["case_id"] in place]
        return sorted(map(Prediction.from_row, rows), key=lambda p: (checkpoints.index(p.run), place[p.case_id]))


def runs(places: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Ascending places of the ring in runs of neighbours, of at most `size`: (first, one behind the last)."""
    found: list[tuple[int, int]] = []
    for place in places:
        first, end = found[-1] if found else (0, -1)
        if place == end and end - first < size:
            found[-1] = (first, end + 1)
        else:
            found.append((place, place + 1))
    return found


def ring(patients: Sequence[str], seed: int) -> np.ndarray:
    """The cases in a random order, one of each patient in turn: neighbours are of different patients where it can be.

    The last one's neighbour is the first.
    """
    rng = np.random.default_rng(seed)
    turn: Counter[str] = Counter()
    rank = dict(zip(dict.fromkeys(patients), rng.permutation(len(set(patients))), strict=True))
    keys = []
    for i in rng.permutation(len(patients)):
        keys.append((turn[patients[i]], rank[patients[i]], int(i)))
        turn[patients[i]] += 1
    return np.array([i for _, _, i in sorted(keys)], dtype=int)


def checked(request: Request) -> Shards:
    """The shards of a request; a UserError where a checkpoint cannot write of them."""
    shards = Shards.open(request.data)
    shards.schema(request.split)
    for uri in request.checkpoints.values():
        checkpoint = open_checkpoint(uri)
        if checkpoint.lineage.stage == "contrastive":
            raise UserError(f"{uri} is a contrastive checkpoint and writes no reports; train sft from it")
        if checkpoint.lineage.spec_hash != shards.spec.hash:
            raise UserError(
                f"{uri} expects scans prepared by spec {checkpoint.spec_title}, {request.data} has "
                f"{shards.spec.title}: ingest the scans with the checkpoint's preset"
            )
    return shards


def _finished(folder: str) -> dict[tuple[int, int], str]:
    """What an interrupted request had finished: places of the ring (first, one behind the last) → file."""
    names = [_FILE.fullmatch(info.base_name) for info in storage.list_files(folder)]
    return {(int(name[1]), int(name[2])): storage.join(folder, name[0]) for name in names if name}


def _written(meant: _Meant, places: Sequence[int], progress: Counted | None) -> Iterator[tuple[int, int, pa.Table]]:
    """Runs of these places (first, one behind the last) and their predictions, as the actors finish them."""
    request = meant.request
    left = runs(places, request.inference.batch_size)
    if not left:
        return
    rows = meant.shards.rows_of(request.split, meant.cases)[meant.order]
    reader = CaseReader.of(meant.shards, request.split, rows)
    batches = ray.data.from_items([{"first": first, "end": end} for first, end in left], override_num_blocks=len(left))
    batches.context.target_max_block_size = None  # a batch stays one block, however large
    batches.context.raise_original_map_exception = True
    scans = batches.map_batches(
        reader,
        batch_size=1,
        batch_format="numpy",
        num_cpus=0.25,
        compute=TaskPoolStrategy(size=min(reading_tasks(), len(left))),
    )
    written = scans.map_batches(
        Writer,
        fn_constructor_args=(request, dict(zip(meant.cases, meant.patients, strict=True))),
        batch_size=None,
        **resources(request.inference, len(left)),
    )
    mend = "what was written is kept, run again to go on (out of memory: lower batch_size or max_sequences)"
    ends, done = dict(left), len(meant.cases) - len(places)
    with failures("writing reports", mend):
        for table in written.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(table, pa.Table)
            first = table["first"][0].as_py()
            yield first, ends[first], table.drop_columns("first").cast(Prediction.arrow_schema)
            done += ends[first] - first
            if progress:
                progress(done, len(meant.cases))

"""Reports for many cases on Ray Data: readers feed actors that hold the checkpoints.

The cases stand in a ring in which each one's neighbour is another patient; "shuffled" is the neighbour's scan, so a
batch needs but one scan more than it has cases, and each scan is encoded once for all that is asked about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

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
from mu2llm.records import Case


def generate(request: Request, state: str | None = None, progress: Counted | None = None) -> list[Prediction]:
    """Writes all that is requested; the cases in the order of the shards.

    With `state` (a URI) finished cases are kept there and an interrupted request goes on, also with another batch
    size. Raises UserError where a checkpoint cannot write, or expects another preprocessing than the shards have.
    """
    shards = checked(request)
    cases = request.cases(shards)
    order = ring([case.patient for case in cases], request.decoding.seed)
    kept = storage.join(state, request.identity.digest) if state else None
    tables = _finished(kept) if kept else []
    done = {case for table in tables for case in table["case_id"].unique().to_pylist()}
    left = runs([place for place, i in enumerate(order) if cases[i].id not in done], request.inference.batch_size)
    ends, written = dict(left), len(cases) - sum(end - first for first, end in left)
    for first, table in _written(request, shards, cases, order, left):
        if kept:
            name = f"{first:06d}-{ends[first]:06d}.parquet"
            storage.write_table(storage.join(kept, name), table)
        tables.append(table)
        written += ends[first] - first
        if progress:
            progress(written, len(cases))
    checkpoints, place = list(request.checkpoints), {case.id: i for i, case in enumerate(cases)}
    predictions = [Prediction.from_row(row) for table in tables for row in table.to_pylist()]
    return sorted(predictions, key=lambda p: (checkpoints.index(p.run), place[p.case_id]))


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


def _finished(folder: str) -> list[pa.Table]:
    """What an interrupted request had finished."""
    names = sorted(info.base_name for info in storage.list_files(folder))
    return [
        storage.read_table(storage.join(folder, name))
        for name in names
        if name.endswith(".parquet") and not name.startswith(".")
    ]


def _written(
    request: Request, shards: Shards, cases: list[Case], order: np.ndarray, left: list[tuple[int, int]]
) -> Iterator[tuple[int, pa.Table]]:
    """The first place of a run and its predictions, as the actors finish them."""
    if not left:
        return
    rows = shards.rows_of(request.split, [case.id for case in cases])[order]
    reader = CaseReader.of(shards, request.split, rows)
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
        fn_constructor_args=(request, {case.id: case.patient for case in cases}),
        batch_size=None,
        **resources(request.inference, len(left)),
    )
    mend = "what was written is kept, run again to go on (out of memory: lower batch_size or max_sequences)"
    with failures("writing reports", mend):
        for table in written.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(table, pa.Table)
            yield table["first"][0].as_py(), table.drop_columns("first").cast(Prediction.arrow_schema)

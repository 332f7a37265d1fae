"""Ingest: case table → shards, on Ray Data.

The cases are divided beforehand into the rows of the shards to be, in an order that only their ids decide. Each such
group is one task of Ray Data: it reads, decodes and preprocesses its scans one after the other and writes its file at
once. A file that is there is done, so a run after a kill goes on where the last one was, with the same result.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from mu2llm import artefacts, ct, storage, telemetry
from mu2llm.cases.shards import INDEX, Index, ShardFile, Shards, ShardWriter, read_summary, write_index
from mu2llm.cases.table import CaseTable
from mu2llm.cases.tensors import tensor_field
from mu2llm.config import Experiment
from mu2llm.errors import Failure, Rejection, UserError
from mu2llm.progress import Counted
from mu2llm.records import Case, PreprocessSpec
from mu2llm.settings.data import DataConfig

SPLITS = ("train", "validation", "test")
REJECTED = "rejected.parquet"
MANIFEST = "manifest.json"
SMALL_SHARDS = 16  # shards of a split that is small, to keep several cores busy; and the least rows of a shard
READ_AHEAD = 2  # scans whose bytes are fetched while one is decoded

REJECTIONS = pa.schema([pa.field(name, pa.string()) for name in ("uri", "reason", "message", "case_id")])


class OverBudget(Failure):
    """More scans were rejected than the budget allows. All else is written; `result` is what `ingest` would give."""

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


def schema(spec: PreprocessSpec) -> pa.Schema:
    """Columns of a shard: the case, the model's input, facts of the scan."""
    return pa.schema(
        [
            *Case.arrow_schema,
            tensor_field("voxels", spec.shape, spec.dtype),
            tensor_field("chunk_mask", (spec.chunks,), "bool"),
            tensor_field("affine", (4, 4), "float64"),
            tensor_field("spacing_mm", (3,), "float64"),
            pa.field("warnings", pa.string(), metadata={b"encoding": b"json"}),
        ]
    )


def ingest(table: CaseTable, out: str, experiment: Experiment, progress: Counted | None = None) -> dict[str, Any]:
    """Writes the shards of a case table below `out`; run again, it goes on and does nothing twice.

    Gives `{cases, written, rejected: {reason: n}, seconds, bytes, splits: {name: n}}`. Over the rejection budget it
    raises OverBudget after everything is written. Storage that fails is tried again and then a Failure, never a
    rejection.
    """
    started = time.monotonic()
    out, data = storage.absolute(out), experiment.data
    _check_target(out, data.spec)
    groups = plan(table, data)
    summaries = _run(groups, out, data, table, progress)
    rejected = [*table.rejections, *(Rejection(**row) for summary in summaries for row in summary["rejected"])]
    _write_rest(out, table, rejected)
    shards = _write_index(out, table, experiment, groups, summaries)
    _sweep(out, shards)
    result = {
        "cases": len(table.cases) + len(table.rejections),
        "written": sum(shards.count(split) for split in SPLITS),
        "rejected": dict(sorted(collections.Counter(r.reason for r in rejected).items())),
        "seconds": round(time.monotonic() - started, 2),
        "bytes": sum(file.bytes for files in shards.index.splits.values() for file in files),
        "splits": {split: shards.count(split) for split in SPLITS},
    }
    _check_budget(result, out, data.rejection_budget)
    return result


def plan(table: CaseTable, data: DataConfig) -> dict[str, list[Case]]:
    """Path of each shard below `out` → its cases. The path names cases, spec and what the listing said of the scans, so
    that it changes with them: a scan that was repaired or replaced is read again."""
    groups = {}
    row_bytes = math.prod(data.spec.shape) * np.dtype(data.spec.dtype).itemsize
    for split in SPLITS:
        cases = sorted((case for case in table.cases if case.split == split), key=_shuffled)
        size = max(1, min(data.shard_mb * 2**20 // row_bytes, max(SMALL_SHARDS, -(-len(cases) // SMALL_SHARDS))))
        for number, group in enumerate(cases[start : start + size] for start in range(0, len(cases), size)):
            stamps = [table.facts[case.volume].stamp if case.volume in table.facts else None for case in group]
            digest = artefacts.digest([[case.row() for case in group], stamps, data.spec.hash, sorted(data.accept)])
            groups[f"{split}/{number:05d}-{digest}.parquet"] = group
    return groups


def _shuffled(case: Case) -> bytes:
    return hashlib.sha256(case.id.encode()).digest()


def _run(
    groups: dict[str, list[Case]], out: str, data: DataConfig, table: CaseTable, progress: Counted | None
) -> list[dict[str, Any]]:
    """Every group's summary, in the order of the plan."""
    if not groups:
        return []
    summaries = ray.data.from_arrow([group_table(path, cases) for path, cases in groups.items()]).map_batches(
        functools.partial(write_shard, out=out, spec=data.spec, accept=data.accept),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
        memory=_memory(table),
    )
    done: dict[str, dict[str, Any]] = {}
    cases = 0
    for row in summaries.iter_rows():
        done[row["path"]] = summary = json.loads(row["summary"])
        if "failed" in summary:
            raise (UserError if summary["user_error"] else Failure)(summary["failed"])
        cases += len(groups[row["path"]])
        telemetry.ingested(len(summary["ids"]), summary["rejected"])
        if progress:
            progress(cases, len(table.cases))
    return [done[path] for path in groups]


def group_table(path: str, cases: list[Case]) -> pa.Table:
    """One task's input: the cases of a shard and its path."""
    return Case.table(cases).append_column("path", pa.array([path] * len(cases)))


def _memory(table: CaseTable) -> float:
    """Bytes that Ray is to set aside for one task: the largest scan, decompressed and on its way; what the cluster has
    at most, so that one large scan cannot make the task impossible to place."""
    largest = max((facts.bytes for facts in table.facts.values()), default=0)
    return min(2**29 + 8 * largest, ray.cluster_resources().get("memory", 2**31) / 2)


def write_shard(group: pa.Table, out: str, spec: PreprocessSpec, accept: tuple[str, ...]) -> pa.Table:
    """The task: writes the shard of a group, unless it is there already, and gives its summary or why it failed."""
    path = group["path"][0].as_py()
    target = storage.join(out, path)
    try:
        if not storage.exists(target):
            _write(target, [Case.from_row(row) for row in group.to_pylist()], spec, accept)
        summary = {**read_summary(target), "bytes": storage.info(target).size}
    except (Failure, UserError) as error:
        summary = {"failed": str(error), "user_error": isinstance(error, UserError)}
    return pa.table({"path": [path], "summary": [json.dumps(summary)]})


def _write(target: str, cases: list[Case], spec: PreprocessSpec, accept: tuple[str, ...]) -> None:
    rejected: list[dict[str, str]] = []
    written: list[str] = []
    with storage.staged(target) as local, ShardWriter(local, schema(spec)) as writer:
        for case, result in _scans(cases, spec, accept):
            if isinstance(result, Rejection):
                rejected.append(result.row())
            else:
                writer.write({name: [value] for name, value in result.items()})
                written.append(case.id)
        writer.summarise(ids=written, rejected=rejected)


def _scans(
    cases: list[Case], spec: PreprocessSpec, accept: tuple[str, ...]
) -> Iterator[tuple[Case, dict[str, Any] | Rejection]]:
    """Each case with its row or its Rejection; the next scans are fetched meanwhile."""
    with tempfile.TemporaryDirectory(prefix="mu2llm-") as folder, ThreadPoolExecutor(READ_AHEAD) as pool:
        waiting = collections.deque(cases)
        fetched: collections.deque[Future[Path]] = collections.deque()
        for number, case in enumerate(cases):
            while waiting and len(fetched) <= READ_AHEAD:
                fetched.append(pool.submit(fetch, waiting.popleft().volume, Path(folder, str(number + len(fetched)))))
            try:
                source = fetched.popleft().result()
                yield case, _row(case, source, spec, accept)
            except Rejection as rejection:
                yield case, Rejection(_lasting(case).volume, rejection.reason, rejection.message, case.id)
            shutil.rmtree(Path(folder, str(number)), ignore_errors=True)


def fetch(uri: str, folder: Path) -> Path:
    """A scan as a local path: itself if it is local, else copied below `folder`; Rejection where it is not there."""
    if not storage.is_remote(uri):
        return Path(storage.resolve(uri)[1])
    local = folder / uri.rstrip("/").rsplit("/", 1)[-1]
    try:
        storage.copy(uri, str(local))
    except FileNotFoundError:
        raise Rejection(uri, "not_found", "there is nothing under this path or URI") from None
    return local


def _row(case: Case, source: Path, spec: PreprocessSpec, accept: tuple[str, ...]) -> dict[str, Any]:
    """The row of a shard; Rejection where the scan cannot be used, a Failure that names it for what is our fault."""
    try:
        volume = storage.retried(
            case.volume, lambda: ct.read(source, series=case.series, rescale=case.rescale, accept=accept)
        )
        model_input = ct.prepare(ct.admit(volume, accept), spec)
    except (Rejection, Failure, UserError):
        raise
    except Exception as error:
        logging.getLogger(__name__).exception("case %s", case.id)
        what = f"{type(error).__name__}: {error}"
        raise Failure(f"case {case.id} ({case.volume}): {what}; leave it out of the manifest to go on") from error
    return {
        **_lasting(case).row(),
        "voxels": model_input.voxels,
        "chunk_mask": model_input.chunk_mask,
        "affine": model_input.affine,
        "spacing_mm": volume.spacing_mm,
        "warnings": json.dumps(volume.warnings),
    }


def _lasting(case: Case) -> Case:
    """The case with the URI of its volume as it is to be recorded."""
    return case.model_copy(update={"volume": storage.lasting(case.volume)})


def _check_target(out: str, spec: PreprocessSpec) -> None:
    if storage.exists(storage.join(out, INDEX)) and Shards.open(out).spec.hash != spec.hash:
        raise UserError(f"{out} holds shards of another spec than {spec.name} ({spec.hash}); give another --out")


def _write_rest(out: str, table: CaseTable, rejected: list[Rejection]) -> None:
    """The table of rejected scans, and what was found in the manifest."""
    rows = sorted((rejection.row() for rejection in rejected), key=lambda row: (row["case_id"], row["uri"]))
    storage.write_table(storage.join(out, REJECTED), pa.Table.from_pylist(rows, schema=REJECTIONS))
    storage.write_json(storage.join(out, MANIFEST), {"counts": table.counts, "listed": table.listed})


def _write_index(
    out: str, table: CaseTable, experiment: Experiment, groups: dict[str, list[Case]], summaries: list[dict[str, Any]]
) -> Shards:
    files: dict[str, list[ShardFile]] = {split: [] for split in SPLITS}
    cases = {case.id: case for case in table.cases}
    written: list[Case] = []
    for path, summary in zip(groups, summaries, strict=True):
        facts = {name: summary[name] for name in ("rows", "bytes", "sha256")}
        files[path.split("/")[0]].append(ShardFile(path=path, **facts))
        written.extend(_lasting(cases[name]) for name in summary["ids"])
    index = Index.of(experiment.data.spec, files, experiment=experiment.model_dump(mode="json"))
    return write_index(out, index, written)


def _sweep(out: str, shards: Shards) -> None:
    """Removes files of an earlier plan, and what a kill left half written."""
    kept = {file.path for files in shards.index.splits.values() for file in files}
    for split in SPLITS:
        for info in storage.list_files(storage.join(out, split)):
            name = f"{split}/{info.base_name}"
            if name not in kept:
                storage.delete(storage.join(out, name))


def _check_budget(result: dict[str, Any], out: str, budget: float) -> None:
    rejected = sum(result["rejected"].values())
    if rejected > budget * result["cases"] or not result["written"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in result["rejected"].items())
        raise OverBudget(
            f"{rejected} of {result['cases']} scans were rejected ({reasons}), over data.rejection_budget {budget:g}; "
            f"all else is written; see {storage.join(out, REJECTED)}",
            result,
        )

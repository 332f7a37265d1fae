"""Ingest: case table → shards, on Ray Data.

The cases are divided beforehand into the rows of the shards to be, in an order that only their ids decide. Each such
group is one task of Ray Data: it reads, decodes and preprocesses its scans one after the other and writes its file at
once. A file that is there is done, so a run after a kill goes on where the last one was, with the same result.

A task asks for the memory that its own largest scan takes. What is wrong with a scan makes it a rejection. What is not
the scan's fault, an object that storage does not give or an error of ours, ends nothing: everything else is written,
what failed is listed in `failed.parquet`, and the ingest fails at its end.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import math
import secrets
import shutil
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from mu2llm import artefacts, ct, logs, storage, telemetry
from mu2llm.cases import examination, node_memory
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
FAILED = "failed.parquet"
MOST_FAILURES = 100  # of scans, after which it is no single one that fails
BEGUN = "begun"  # below `out` while a run goes on
ATTEMPTS = 3  # of a task whose process dies

REJECTIONS = pa.schema([pa.field(name, pa.string()) for name in ("uri", "reason", "message", "case_id")])
FAILURES = REJECTIONS.append(pa.field("trace", pa.string()))
FAILURE_REASONS: dict[str, str] = {
    "unreadable": "storage did not give the scan, however often it was asked",
    "unexpected": "an error of ours while the scan was read, or the end of the task that read it",
}
"""Why a scan failed that was not rejected, in `failed.parquet`: code → description."""


class OverBudget(Failure):
    """More scans were rejected than the budget allows. All else is written; `result` is what `ingest` would give."""

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


class Unwritten(Exception):
    """Scans of a shard failed: rows of `failed.parquet`. The shard is not written."""

    def __init__(self, failures: list[dict[str, str]]) -> None:
        super().__init__(failures)
        self.failures = failures


def schema(spec: PreprocessSpec) -> pa.Schema:
    """Columns of a shard: the case, the model's input, facts of the scan (of several series, of the first)."""
    of_case = [field for field in Case.arrow_schema if spec.series > 1 or field.name != "further"]
    return pa.schema(
        [
            *of_case,
            tensor_field("voxels", spec.shape, spec.dtype),
            tensor_field("chunk_mask", (spec.shape[0],), "bool"),
            tensor_field("affine", (4, 4), "float64"),
            tensor_field("spacing_mm", (3,), "float64"),
            pa.field("warnings", pa.string(), metadata={b"encoding": b"json"}),
        ]
    )


def ingest(table: CaseTable, out: str, experiment: Experiment, progress: Counted | None = None) -> dict[str, Any]:
    """Writes the shards of a case table below `out`; run again, it goes on and does nothing twice.

    Gives `{cases, written, rejected: {reason: n}, seconds, bytes, splits: {name: n}}`, and where several series are
    read of a case `fewer_series`, the cases that have fewer. Over the rejection budget it raises OverBudget after
    everything is written. Scans that failed (`FAILURE_REASONS`) are a Failure after everything else is written, and in
    `failed.parquet` with their traces; `data.exclude` goes on without them. Storage that fails is tried again and never
    makes a scan a rejected one.
    """
    started = time.monotonic()
    out, data = storage.absolute(out), experiment.data
    _check_target(out, data.spec)
    node = node_memory.largest_node()
    excluded, too_large = _excluded(table, data), _too_large(table, node)
    table.note("excluded", sorted(excluded))
    groups = plan(table, data, excluded | too_large.keys())
    summaries = _run(groups, out, data, table, progress, node)
    of_files = (Rejection(**row) for summary in summaries for row in summary["rejected"])
    fewer = [id for summary in summaries for id in summary.get("fewer_series", [])]
    table.note("fewer_series", fewer)
    rejected = [*table.rejections, *(each for id, each in too_large.items() if id not in excluded), *of_files]
    _write_rest(out, table, rejected)
    shards = _write_index(out, table, experiment, groups, summaries)
    _sweep(out, shards)
    result = {
        "cases": len(table.cases) - len(excluded) + len(table.rejections),
        "written": sum(shards.count(split) for split in SPLITS),
        "rejected": dict(sorted(collections.Counter(r.reason for r in rejected).items())),
        "seconds": round(time.monotonic() - started, 2),
        "bytes": sum(file.bytes for files in shards.index.splits.values() for file in files),
        "splits": {split: shards.count(split) for split in SPLITS},
        **({"fewer_series": len(fewer)} if data.spec.series > 1 else {}),
    }
    _check_budget(result, out, data.rejection_budget)
    return result


def plan(table: CaseTable, data: DataConfig, left_out: Collection[str] = ()) -> dict[str, list[Case]]:
    """Path of each shard below `out` → its cases. The path names cases, spec and what the listing said of the scans, so
    that it changes with them: a scan that was repaired or replaced is read again. Cases that are left out, by id, keep
    their place, so that no other shard changes by it."""
    groups = {}
    row_bytes = math.prod(data.spec.shape) * np.dtype(data.spec.dtype).itemsize
    for split in SPLITS:
        cases = sorted((case for case in table.cases if case.split == split), key=_shuffled)
        size = max(1, min(data.shard_mb * 2**20 // row_bytes, max(SMALL_SHARDS, -(-len(cases) // SMALL_SHARDS))))
        for number, start in enumerate(range(0, len(cases), size)):
            group = [case for case in cases[start : start + size] if case.id not in left_out]
            if not group:
                continue
            places = [each.volume for case in group for each in case.every_series]
            stamps = [table.facts[place].stamp if place in table.facts else None for place in places]
            rows = [_without_empty(case.row()) for case in group]
            together = ["together"] if data.together else []
            digest = artefacts.digest([rows, stamps, data.spec.hash, sorted(data.accept), *together])
            groups[f"{split}/{number:05d}-{digest}.parquet"] = group
    return groups


def _without_empty(row: dict[str, Any]) -> dict[str, Any]:
    """A case's row without the column for further series where it has none, as the rows of one series always were."""
    return {name: value for name, value in row.items() if (name, value) != ("further", "[]")}


def _excluded(table: CaseTable, data: DataConfig) -> set[str]:
    """Ids of the cases that `data.exclude` names by id or URI; a UserError where it names something else."""
    wanted = set(data.exclude)
    names = {case.id: _names(case) for case in table.cases}
    unknown = wanted.difference(*names.values(), *({each.case_id, each.uri} for each in table.rejections))
    if unknown:
        raise UserError(f"data.exclude: {min(unknown)!r} is neither a case's id nor the URI of its volume")
    return {id for id, known in names.items() if wanted & known}


def _names(case: Case) -> set[str]:
    """What `data.exclude` may call a case."""
    places = {each.volume for each in case.every_series}
    return {case.id, *places, *map(storage.lasting, places)}


def _too_large(table: CaseTable, node: int | None) -> dict[str, Rejection]:
    """By id, the scans that take more memory than the largest node has."""
    found = {}
    for case in table.cases:
        size = _bytes(table, [case])
        if not node_memory.fits(size, node):
            why = f"its {size / 2**30:.1f} GiB do not fit into the memory of the largest node ({node} bytes)"
            why += "; ingest on a larger one"
            found[case.id] = Rejection(storage.lasting(case.volume), "too_large", why, case.id)
    return found


def _bytes(table: CaseTable, cases: list[Case]) -> int:
    """The bytes of the largest examination of a group; 0 where nothing is known."""
    places = [{each.volume for each in case.every_series} & table.facts.keys() for case in cases]
    return max((sum(table.facts[place].bytes for place in each) for each in places), default=0)


def _shuffled(case: Case) -> bytes:
    return hashlib.sha256(case.id.encode()).digest()


def _run(
    groups: dict[str, list[Case]],
    out: str,
    data: DataConfig,
    table: CaseTable,
    progress: Counted | None,
    node: int | None,
) -> list[dict[str, Any]]:
    """Every group's summary, in the order of the plan; a Failure once all else is done where scans failed."""
    done: dict[str, dict[str, Any]] = {}
    failures: list[dict[str, str]] = []
    cases = 0
    for row in _tasks(groups, out, data, table, node).iter_rows() if groups else ():
        done[row["path"]] = summary = json.loads(row["summary"])
        if "failed" in summary:
            raise (UserError if summary["user_error"] else Failure)(summary["failed"])
        cases += len(groups[row["path"]])
        if progress:
            progress(cases, len(table.cases))
        if failed := summary.get("failures"):
            failures += failed
            if len(failures) > MOST_FAILURES:
                break
        else:
            telemetry.ingested(len(summary["ids"]), summary["rejected"])
    storage.delete(storage.join(out, BEGUN))
    _tell(failures, out)
    return [done[path] for path in groups]


def _tasks(
    groups: dict[str, list[Case]], out: str, data: DataConfig, table: CaseTable, node: int | None
) -> ray.data.Dataset:
    """One task a group. Those of one size class ask for the same memory."""
    by_class: dict[int, list[pa.Table]] = defaultdict(list)
    for path, cases in groups.items():
        by_class[node_memory.asked(_bytes(table, cases), node)].append(group_table(path, cases))
    begun = storage.join(out, BEGUN, secrets.token_hex(4))
    write = partial(write_shard, out=out, data=data, begun=begun)
    classes = [
        ray.data.from_arrow(tables).map_batches(
            write, batch_size=None, batch_format="pyarrow", num_cpus=1, memory=memory
        )
        for memory, tables in sorted(by_class.items(), reverse=True)
    ]
    return classes[0].union(*classes[1:]) if classes[1:] else classes[0]


def _tell(failures: list[dict[str, str]], out: str) -> None:
    """Lists what failed beside the shards, and raises the Failure that says so; nothing where nothing did."""
    listed = storage.join(out, FAILED)
    if not failures:
        storage.delete(listed)
        return
    storage.write_table(listed, pa.Table.from_pylist(failures, schema=FAILURES))
    first = failures[0]
    counts = collections.Counter(each["reason"] for each in failures)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
    rest = "all else is written" if len(failures) <= MOST_FAILURES else "too many to go on"
    raise Failure(
        f"{len(failures)} scans failed ({reasons}), such as case {first['case_id']} ({first['uri']}): "
        f"{first['message']}; {rest}; see {listed} for all of them, run the same command again to try them again, or "
        "name them in data.exclude to go on without them"
    )


def group_table(path: str, cases: list[Case]) -> pa.Table:
    """One task's input: the cases of a shard and its path."""
    return Case.table(cases).append_column("path", pa.array([path] * len(cases)))


def write_shard(group: pa.Table, out: str, data: DataConfig, begun: str | None = None) -> pa.Table:
    """The task: writes the shard of a group, unless it is there already, and gives its summary, the scans that failed,
    or why nothing can be written. Below `begun` lies how often a run began each shard."""
    path = group["path"][0].as_py()
    target = storage.join(out, path)
    try:
        if not storage.exists(target):
            cases = [Case.from_row(row) for row in group.to_pylist()]
            if begun:
                _begin(storage.join(begun, path), cases)
            _write(target, cases, data)
        summary = {**read_summary(target), "bytes": storage.info(target).size}
    except Unwritten as error:
        summary = {"failures": error.failures}
    except (Failure, UserError) as error:
        summary = {"failed": str(error), "user_error": isinstance(error, UserError)}
    return pa.table({"path": [path], "summary": [json.dumps(summary)]})


def _begin(marks: str, cases: list[Case]) -> None:
    """Marks that a shard is begun; Unwritten where its task died too often. Ray Data starts such a task for ever."""
    if len(storage.list_files(marks)) < ATTEMPTS:
        storage.write_bytes(storage.join(marks, secrets.token_hex(4)), b"")
        return
    why = f"the process that read it and {len(cases) - 1} others died {ATTEMPTS} times; one takes all memory or ends it"
    rejections = [Rejection(_lasting(case).volume, "unexpected", why, case.id) for case in cases]
    raise Unwritten([{**each.row(), "trace": ""} for each in rejections])


def _write(target: str, cases: list[Case], data: DataConfig) -> None:
    logs.begin(stage="ingest")
    rejected: list[dict[str, str]] = []
    failures: list[dict[str, str]] = []
    written: list[str] = []
    fewer: list[str] = []
    with storage.staged(target) as local, ShardWriter(local, schema(data.spec)) as writer:
        for case, result in _scans(cases, data):
            if isinstance(result, Rejection):
                rejected.append(result.row())
            elif isinstance(result, dict):
                writer.write({name: [value] for name, value in result.items()})
                written.append(case.id)
                fewer += [case.id] if "series_missing" in json.loads(result["warnings"]) else []
            else:
                failures.append(_failure(case, result))
        if failures:
            raise Unwritten(failures)
        writer.summarise(ids=written, rejected=rejected, **({"fewer_series": fewer} if fewer else {}))


def _failure(case: Case, error: Exception) -> dict[str, str]:
    """A row of `failed.parquet`."""
    ours = not isinstance(error, Failure)
    reason, message = ("unexpected", f"{type(error).__name__}: {error}") if ours else ("unreadable", str(error))
    trace = "".join(traceback.format_exception(error))
    return {**Rejection(_lasting(case).volume, reason, message, case.id).row(), "trace": trace}


def _scans(cases: list[Case], data: DataConfig) -> Iterator[tuple[Case, dict[str, Any] | Rejection | Exception]]:
    """Each case with its row, its Rejection or what failed; the next scans are fetched meanwhile."""
    with tempfile.TemporaryDirectory(prefix="mu2llm-") as folder, ThreadPoolExecutor(READ_AHEAD) as pool:
        waiting = collections.deque(cases)
        fetched: collections.deque[Future[list[Path]]] = collections.deque()
        for number, case in enumerate(cases):
            while waiting and len(fetched) <= READ_AHEAD:
                place = Path(folder, str(number + len(fetched)))
                fetched.append(pool.submit(examination.fetched, waiting.popleft(), place))
            yield case, _result(case, fetched.popleft(), data)
            shutil.rmtree(Path(folder, str(number)), ignore_errors=True)


def _result(case: Case, sources: Future[list[Path]], data: DataConfig) -> dict[str, Any] | Rejection | Exception:
    """The row, the Rejection or the error of one case; a UserError, such as an unknown code to accept, is of all."""
    try:
        return _row(case, sources.result(), data)
    except Rejection as rejection:
        return Rejection(_lasting(case).volume, rejection.reason, rejection.message, case.id)
    except UserError:
        raise
    except Exception as error:  # told at the end, with its trace
        logging.getLogger(__name__).exception("case %s", case.id)
        return error


def _row(case: Case, sources: list[Path], data: DataConfig) -> dict[str, Any]:
    """The row of a shard; Rejection where one of its series cannot be used."""
    spec, series = data.spec, case.every_series
    volumes = examination.volumes(series, sources, data.accept, spec.series if data.together else None)
    if data.together and examination.unnamed(series):
        case = examination.named(case, volumes)
    model_input = ct.prepare(volumes, spec)
    return {
        **_lasting(case).row(),
        "voxels": model_input.voxels,
        "chunk_mask": model_input.chunk_mask,
        "affine": model_input.affine,
        "spacing_mm": volumes[0].spacing_mm,
        "warnings": json.dumps(ct.warnings(volumes, spec)),
    }


def _lasting(case: Case) -> Case:
    """The case with the URIs of its volumes as they are to be recorded."""
    further = tuple(each.model_copy(update={"volume": storage.lasting(each.volume)}) for each in case.further)
    return case.model_copy(update={"volume": storage.lasting(case.volume), "further": further})


def _check_target(out: str, spec: PreprocessSpec) -> None:
    if storage.exists(storage.join(out, INDEX)) and Shards.open(out).spec.hash != spec.hash:
        raise UserError(f"{out} holds shards of another spec than {spec.title}; give another --out")


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

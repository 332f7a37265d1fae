"""Shards: a folder of Parquet files with one row a row group, so that any row can be read on its own.

<uri>/<split>/*.parquet   the rows: columns of Case, voxels, chunk_mask, facts of the scan
<uri>/cases.parquet       every Case, without voxels, in the rows' order
<uri>/shards.json         spec, checksum, files with their rows; written last
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from mu2llm import storage
from mu2llm.cases import tensors
from mu2llm.errors import UserError
from mu2llm.records import Case, PreprocessSpec

FORMAT_VERSION = 1
INDEX = "shards.json"
CASES = "cases.parquet"
SUMMARY = b"mu2llm"  # the key of a file's summary in its Parquet metadata
READS = 16  # at once, of rows in object storage: it gives a connection some 60 MB a second, and there are many
OPEN_LOCAL, OPEN_REMOTE = 256, 4096  # files that a process keeps open; one on a disk takes a descriptor


class ShardFile(BaseModel):
    """One Parquet file: its path below the shards, rows, size and the SHA-256 of its rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    rows: int
    bytes: int
    sha256: str


class Index(BaseModel):
    """What `shards.json` holds. `checksum` is over the spec and the rows of all files."""

    model_config = ConfigDict(frozen=True, extra="allow")
    format_version: int = FORMAT_VERSION
    spec: PreprocessSpec
    spec_hash: str
    checksum: str
    splits: dict[str, list[ShardFile]]

    @classmethod
    def of(cls, spec: PreprocessSpec, splits: dict[str, list[ShardFile]], **facts: Any) -> Self:
        digest = hashlib.sha256(spec.hash.encode())
        for split in sorted(splits):
            for file in splits[split]:
                digest.update(f"{split} {file.rows} {file.sha256}\n".encode())
        return cls(spec=spec, spec_hash=spec.hash, checksum=digest.hexdigest(), splits=splits, **facts)


class Shards:
    """Finished shards, or a table derived from them, opened by their index."""

    def __init__(self, uri: str, index: Index) -> None:
        self.uri, self.index = uri, index

    @classmethod
    def open(cls, uri: str) -> Self:
        """The shards at a URI; a UserError where there are none, or of a version this program cannot read."""
        uri = storage.absolute(uri)
        try:
            values = storage.read_json(storage.join(uri, INDEX))
        except FileNotFoundError:
            raise UserError(f"{uri} holds no finished shards (no {INDEX}); run mu2llm ingest to its end") from None
        if values.get("format_version") != FORMAT_VERSION:
            found = values.get("format_version")
            raise UserError(f"{uri}: shards of format {found}, this program reads {FORMAT_VERSION}; ingest them again")
        try:
            return cls(uri, Index.model_validate(values))
        except ValidationError as error:
            raise UserError(f"{uri}/{INDEX}: {error.errors()[0]['msg']}; ingest again") from None

    @staticmethod
    def there(uri: str) -> bool:
        """Whether finished shards lie at a URI."""
        return bool(uri) and storage.exists(storage.join(uri, INDEX))

    @property
    def spec(self) -> PreprocessSpec:
        return self.index.spec

    @property
    def checksum(self) -> str:
        return self.index.checksum

    @property
    def origin_checksum(self) -> str:
        """The checksum of the shards that a derived table was made of; else its own."""
        return str(getattr(self.index, "parent_checksum", self.checksum))

    def count(self, split: str) -> int:
        """Rows of a split; 0 for one that is not there."""
        return sum(file.rows for file in self.index.splits.get(split, []))

    def files(self, split: str) -> list[str]:
        """URIs of the files that have rows, in order."""
        return [storage.join(self.uri, file.path) for file in self.index.splits.get(split, []) if file.rows]

    def rows(self, split: str) -> list[int]:
        """The number of rows of each of `files`."""
        return [file.rows for file in self.index.splits.get(split, []) if file.rows]

    def cases(self, split: str, rows: Sequence[int] | None = None) -> list[Case]:
        """The cases of a split, without voxels, in the rows' order; or those of some rows."""
        table = self._cases(split)
        if rows is not None:
            table = table.take(pa.array(rows, pa.int64()))
        return [Case.from_row(row) for row in table.to_pylist()]

    def ids(self, split: str) -> list[str]:
        """The ids of the cases of a split, in the rows' order."""
        names: list[str] = self._cases(split).column("id").to_pylist()
        return names

    def patients(self, split: str) -> list[str]:
        """Whose they are, in the rows' order."""
        names: list[str] = self._cases(split).column("patient").to_pylist()
        return names

    def subset(self, split: str, fraction: float, seed: int) -> list[str]:
        """The ids of the cases of a fraction of a split's patients, drawn by the seed, in the rows' order.

        At least one patient; a smaller fraction lies within a larger one.
        """
        table = self._cases(split)
        patients = table.column("patient").to_pylist()
        known = list(dict.fromkeys(patients))
        drawn = np.random.default_rng([seed, 0]).permutation(len(known))[: max(1, round(fraction * len(known)))]
        kept = {known[i] for i in drawn}
        return [name for name, each in zip(table.column("id").to_pylist(), patients, strict=True) if each in kept]

    def rows_of(self, split: str, ids: Sequence[str]) -> np.ndarray:
        """The rows in a split of cases by their ids; a UserError names those that are not there."""
        rows = {name: row for row, name in enumerate(self.ids(split))}
        missing = [name for name in ids if name not in rows]
        if missing:
            raise UserError(f"{self.uri}: {len(missing)} cases are not in split {split!r}, such as {missing[0]}")
        return np.array([rows[name] for name in ids], np.int64)

    def _cases(self, split: str) -> pa.Table:
        table = storage.read_table(storage.join(self.uri, CASES))
        return table.filter(pc.field("split") == split)

    def schema(self, split: str) -> pa.Schema:
        """Columns of a split; a UserError for a split without rows."""
        files = self.files(split)
        if not files:
            there = ", ".join(f"{name} ({self.count(name)})" for name in self.index.splits)
            raise UserError(f"{self.uri} has no rows in split {split!r}; there are {there}")
        return open_file(files[0]).reader().schema_arrow


class Joined(Shards):
    """Shards with the rows of a further table of the same spec behind theirs, split by split. The index, and so the
    checksum, is that of the first."""

    def __init__(self, first: Shards, further: Shards) -> None:
        if first.spec.hash != further.spec.hash:
            raise UserError(f"{first.uri} has spec {first.spec.title}, {further.uri} {further.spec.title}")
        super().__init__(first.uri, first.index)
        self.parts = (first, further)

    def count(self, split: str) -> int:
        return sum(part.count(split) for part in self.parts)

    def files(self, split: str) -> list[str]:
        return [file for part in self.parts for file in part.files(split)]

    def rows(self, split: str) -> list[int]:
        return [rows for part in self.parts for rows in part.rows(split)]

    def _cases(self, split: str) -> pa.Table:
        return pa.concat_tables([part._cases(split) for part in self.parts])


class OpenFile(NamedTuple):
    """A file that is read without another look at its footer, by several threads at once."""

    source: pa.NativeFile
    footer: pq.FileMetaData

    def reader(self) -> pq.ParquetFile:
        """For one thread: of two in one reader the second waits for ever, for a buffer that the first has replaced."""
        return pq.ParquetFile(self.source, metadata=self.footer, page_checksum_verification=True)


def open_file(uri: str) -> OpenFile:
    """An opened file, kept by each process: the files of shards never change under their name."""
    return (_open_remote if storage.is_remote(uri) else _open_local)(uri)


@functools.lru_cache(maxsize=OPEN_LOCAL)
def _open_local(uri: str) -> OpenFile:
    source = pa.memory_map(storage.resolve(uri)[1])
    return OpenFile(source, pq.read_metadata(source))


@functools.lru_cache(maxsize=OPEN_REMOTE)
def _open_remote(uri: str) -> OpenFile:
    filesystem, path = storage.resolve(uri)
    source = storage.retried(uri, lambda: filesystem.open_input_file(path))
    return OpenFile(source, storage.retried(uri, lambda: pq.read_metadata(source)))


def read_rows(files: list[str], counts: list[int], columns: list[str], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows by their number in the split (in any order, also twice) → columns in that order.

    From object storage `READS` parts of them are read at once.
    """
    starts = np.cumsum([0, *counts])
    owners = np.searchsorted(starts, rows, side="right") - 1
    at_once = READS if storage.is_remote(files[0]) else 1
    of_files = [np.flatnonzero(owners == owner) for owner in np.unique(owners)]
    places = [part for place in of_files for part in np.array_split(place, min(at_once, len(place)))]

    def read(place: np.ndarray) -> pa.Table:
        file, groups = files[owners[place[0]]], (rows[place] - starts[owners[place]]).tolist()
        return storage.retried(file, functools.partial(_read_groups, file, groups, columns))

    if at_once == 1:
        tables = list(map(read, places))
    else:
        with ThreadPoolExecutor(min(at_once, len(places))) as pool:
            list(pool.map(open_file, {files[owners[place[0]]] for place in of_files}))  # each once
            tables = list(pool.map(read, places))
    schema = tables[0].schema
    table = pa.concat_tables(tables)
    if len(tables) > 1:
        table = table.take(pa.array(np.argsort(np.concatenate(places))))
    return tensors.decode(table, schema)


def _read_groups(file: str, groups: list[int], columns: list[str]) -> pa.Table:
    return open_file(file).reader().read_row_groups(groups, columns=columns, use_threads=False)


class ShardWriter:
    """Writes rows to one local Parquet file, one row a row group; the summary goes into its footer."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(
            path, schema, compression="lz4", use_dictionary=False, write_statistics=False, write_page_checksum=True
        )
        self._schema = schema
        self._digest = hashlib.sha256()
        self.rows = 0
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()

    def write(self, batch: dict[str, Any]) -> None:
        """Appends the rows of a batch."""
        encoded = tensors.encode(batch, self._schema)
        for row in range(encoded.num_rows):
            one = encoded.slice(row, 1)
            for column in one.columns:
                _update(self._digest, column)
            self._writer.write_batch(one, row_group_size=1)
        self.rows += encoded.num_rows
        self.bytes += encoded.nbytes

    def summarise(self, **facts: Any) -> None:
        """What `read_summary` gives back; `sha256` and `rows` are added."""
        summary = {"rows": self.rows, "sha256": self._digest.hexdigest(), **facts}
        self._writer.add_key_value_metadata({SUMMARY: json.dumps(summary).encode()})


def _update(digest: Any, column: pa.Array) -> None:
    if pa.types.is_fixed_size_binary(column.type):
        size = column.type.byte_width
        digest.update(memoryview(column.buffers()[1])[column.offset * size : (column.offset + 1) * size])
    else:
        digest.update(json.dumps(column.to_pylist(), sort_keys=True, default=str).encode())


def read_summary(uri: str) -> dict[str, Any]:
    """The summary in the footer of a finished file."""
    filesystem, path = storage.resolve(uri)
    metadata = storage.retried(uri, lambda: pq.read_metadata(path, filesystem=filesystem)).metadata
    summary: dict[str, Any] = json.loads(metadata[SUMMARY])
    return summary


def write_index(uri: str, index: Index, cases: list[Case]) -> Shards:
    """Writes what makes the files below a URI into finished shards; the index last."""
    storage.write_table(storage.join(uri, CASES), Case.table(cases))
    return _write_json(uri, index)


def _write_json(uri: str, index: Index) -> Shards:
    storage.write_json(storage.join(uri, INDEX), index.model_dump(mode="json"))
    return Shards(uri, index)


def write_derived(uri: str, files: dict[str, list[ShardFile]], parent: Shards, **facts: Any) -> Shards:
    """Makes files that hold all rows of some shards, split by split and in their order, into a finished table (such as
    cached vision features), and opens it. `facts` go into the index."""
    storage.copy(storage.join(parent.uri, CASES), storage.join(uri, CASES))
    origin = {"parent": storage.lasting(parent.uri), "parent_checksum": parent.checksum}
    return _write_json(uri, Index.of(parent.spec, files, **origin, **facts))


def write_file(uri: str, path: str, batches: Iterator[dict[str, Any]]) -> ShardFile:
    """Writes batches (dicts of columns, with the column `id` of a case), at least one, to a file below a URI."""
    first, ids = next(batches), list[str]()
    with storage.staged(storage.join(uri, path)) as local, ShardWriter(local, tensors.schema_of(first)) as writer:
        for batch in itertools.chain([first], batches):
            writer.write(batch)
            ids.extend(str(name) for name in batch["id"])
        writer.summarise(ids=ids)
    return shard_file(uri, path)


CORRECTED = 16
"""Scans that no manifest named in a file: a file is written whole, and one scan may have 50 MB."""


def write_scans(
    uri: str, split: str, rows: Iterable[dict[str, Any]], cases: list[Case], spec: PreprocessSpec
) -> Shards:
    """Writes scans that no manifest named, in one split, in place of what was at the URI; `rows` are batches of columns
    with `id`, in the order of `cases`."""
    uri, run = storage.absolute(uri), secrets.token_hex(4)  # readers keep files open by name: a new table has new names
    storage.delete(uri)
    batches, files = iter(rows), list[ShardFile]()
    for first in batches:
        together = itertools.chain([first], itertools.islice(batches, CORRECTED - 1))
        files.append(write_file(uri, f"{split}/{len(files):05d}-{run}.parquet", together))
    return write_index(uri, Index.of(spec, {split: files}), cases)


def shard_file(uri: str, path: str) -> ShardFile:
    """The index's entry of a finished file."""
    target = storage.join(uri, path)
    summary = read_summary(target)
    return ShardFile(path=path, rows=summary["rows"], bytes=storage.info(target).size, sha256=summary["sha256"])

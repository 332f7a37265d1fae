"""Judgements that were asked once: Parquet files under a URI, shared by all who judge.

Each writer adds files of its own, so nothing needs a lock on any storage; readers take in what is new before
they ask.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from mu2llm import storage
from mu2llm.green.judge import Judge, Pair, as_judged, measures
from mu2llm.records import Judgement

_CHUNK = 128  # judgements that are saved together: what a kill may lose
_READS = 16  # files read at once
_SCHEMA = pa.schema([pa.field("key", pa.string()), *Judgement.arrow_schema])


class CachedJudge:
    """A judge that asks another only what no one has asked it before."""

    def __init__(self, judge: Judge, uri: str) -> None:
        self._judge = judge
        self._folder = storage.join(uri, hashlib.sha256(judge.identity.encode()).hexdigest()[:16])
        self._known: dict[str, Judgement] = {}
        self._read: set[str] = set()

    @property
    def identity(self) -> str:
        return self._judge.identity

    @property
    def measures(self) -> str:
        return measures(self._judge)

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        keys = [self._key(pair) for pair in pairs]
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._known}
        if missing:
            self._refresh()
        new = [key for key in missing if key not in self._known]
        finished: dict[str, Judgement] = {}
        try:
            for number, judgement in as_judged(self._judge, [missing[key] for key in new], _CHUNK):
                finished[new[number]] = judgement
                if len(finished) == _CHUNK:
                    self._add(finished)
                    finished = {}
        finally:
            if finished:
                self._add(finished)
        return [self._known[key] for key in keys]

    def _key(self, pair: Pair) -> str:
        digest = hashlib.sha256()
        for text in (self.identity, *pair):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        return digest.hexdigest()

    def _refresh(self) -> None:
        new = [each.base_name for each in storage.list_files(self._folder) if each.base_name.endswith(".parquet")]
        new = [name for name in new if name not in self._read]
        with ThreadPoolExecutor(_READS) as pool:
            tables = pool.map(lambda name: storage.read_table(storage.join(self._folder, name)), new)
            for name, table in zip(new, tables, strict=True):
                self._known.update({row.pop("key"): Judgement.from_row(row) for row in table.to_pylist()})
                self._read.add(name)

    def _add(self, judgements: dict[str, Judgement]) -> None:
        rows = [{"key": key, **judgement.row()} for key, judgement in judgements.items()]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer)
        name = hashlib.sha256("".join(judgements).encode()).hexdigest()[:20]
        storage.write_bytes(storage.join(self._folder, f"{name}.parquet"), buffer.getvalue())
        self._known.update(judgements)

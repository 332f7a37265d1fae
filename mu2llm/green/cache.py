"""Judgements that were asked once: Parquet files under a URI, shared by all who judge.

Each writer adds files of its own, so nothing needs a lock on any storage; readers take in what is new before
they ask.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from mu2llm import storage
from mu2llm.green.judge import Judge, Pair, measures
from mu2llm.records import Judgement

_CHUNK = 128  # pairs that are asked and saved together: what a crash may lose
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
        for start in range(0, len(new), _CHUNK):
            chunk = new[start : start + _CHUNK]
            self._add(dict(zip(chunk, self._judge.judge([missing[key] for key in chunk]), strict=True)))
        return [self._known[key] for key in keys]

    def _key(self, pair: Pair) -> str:
        digest = hashlib.sha256()
        for text in (self.identity, *pair):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        return digest.hexdigest()

    def _refresh(self) -> None:
        filesystem, _ = storage.resolve(self._folder)
        for info in storage.list_files(self._folder):
            if info.path not in self._read and info.path.endswith(".parquet"):
                with filesystem.open_input_file(info.path) as stream:
                    rows = pq.read_table(stream).to_pylist()
                self._known.update({row.pop("key"): Judgement.from_row(row) for row in rows})
                self._read.add(info.path)

    def _add(self, judgements: dict[str, Judgement]) -> None:
        rows = [{"key": key, **judgement.row()} for key, judgement in judgements.items()]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer)
        name = hashlib.sha256("".join(judgements).encode()).hexdigest()[:20]
        storage.write_bytes(storage.join(self._folder, f"{name}.parquet"), buffer.getvalue())
        self._known.update(judgements)

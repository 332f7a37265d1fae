"""Judgements that were asked once: Parquet files under a URI, shared by all who judge.

Each writer adds files of its own, so nothing needs a lock on any storage; readers take in what is new before
they ask.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mu2llm import storage
from mu2llm.green.judge import Judge, Pair, as_judged, measures
from mu2llm.records import Judgement

_CHUNK = 128  # judgements that are saved together: what a kill may lose
_RECENT = 4096  # of some 9 KB
_READS = 16  # files read at once
_SCHEMA = pa.schema([pa.field("key", pa.string()), *Judgement.arrow_schema])


class CachedJudge:
    """A judge that asks another only what no one has asked it before. It knows where each judgement lies, and holds the
    last `_RECENT` of them."""

    def __init__(self, judge: Judge, uri: str) -> None:
        self._judge = judge
        self._folder = storage.join(uri, hashlib.sha256(judge.identity.encode()).hexdigest()[:16])
        self._recent: OrderedDict[str, Judgement] = OrderedDict()
        self._files: dict[str, str] = {}
        """Key → name of the file."""
        self._listed: set[str] = set()

    @property
    def identity(self) -> str:
        return self._judge.identity

    @property
    def measures(self) -> str:
        return measures(self._judge)

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        keys = [self._key(pair) for pair in pairs]
        wanted = dict(zip(keys, pairs, strict=True))
        found = self._known(wanted)
        new = [key for key in wanted if key not in found]
        unsaved: dict[str, Judgement] = {}
        try:
            for number, judgement in as_judged(self._judge, [wanted[key] for key in new], _CHUNK):
                unsaved[new[number]] = found[new[number]] = judgement
                if len(unsaved) == _CHUNK:
                    self._add(unsaved)
                    unsaved = {}
        finally:
            if unsaved:
                self._add(unsaved)
        return [found[key] for key in keys]

    def _known(self, wanted: Iterable[str]) -> dict[str, Judgement]:
        """What has been judged of these keys, by whomever."""
        found = {key: judgement for key in wanted if (judgement := self._recent.get(key))}
        rest = [key for key in wanted if key not in found]
        if any(key not in self._files for key in rest):
            self._refresh()
        found |= self._read([key for key in rest if key in self._files])
        return found

    def _key(self, pair: Pair) -> str:
        digest = hashlib.sha256()
        for text in (self.identity, *pair):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        return digest.hexdigest()

    def _refresh(self) -> None:
        names = [each.base_name for each in storage.list_files(self._folder) if each.base_name.endswith(".parquet")]
        new = [name for name in names if name not in self._listed]
        for name, table in self._tables(new):
            self._files.update(dict.fromkeys(table["key"].to_pylist(), name))
            self._listed.add(name)

    def _read(self, keys: Collection[str]) -> dict[str, Judgement]:
        found: dict[str, Judgement] = {}
        for _, table in self._tables(list(dict.fromkeys(self._files[key] for key in keys))):
            rows = table.filter(pc.is_in(table["key"], pa.array(keys, pa.string()))).to_pylist()
            found.update({row.pop("key"): Judgement.from_row(row) for row in rows})
        self._remember(found)
        return found

    def _tables(self, names: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        with ThreadPoolExecutor(_READS) as pool:
            for start in range(0, len(names), _READS):  # no more of them in memory
                some = names[start : start + _READS]
                uris = [storage.join(self._folder, name) for name in some]
                yield from zip(some, pool.map(storage.read_table, uris), strict=True)

    def _add(self, judgements: dict[str, Judgement]) -> None:
        rows = [{"key": key, **judgement.row()} for key, judgement in judgements.items()]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer)
        name = f"{hashlib.sha256(''.join(judgements).encode()).hexdigest()[:20]}.parquet"
        storage.write_bytes(storage.join(self._folder, name), buffer.getvalue())
        self._files.update(dict.fromkeys(judgements, name))
        self._listed.add(name)
        self._remember(judgements)

    def _remember(self, judgements: dict[str, Judgement]) -> None:
        self._recent.update(judgements)
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)

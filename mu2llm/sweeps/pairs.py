"""Pairs by other margins and numbers a case, from the same judged candidates and the same reference log-probabilities.

All pairs that any setting can give are made once, and the reference once on them; every setting takes its part.
"""

from __future__ import annotations

from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from mu2llm import artefacts, storage
from mu2llm.errors import UserError
from mu2llm.records import Candidate, Judgement, PreferencePair
from mu2llm.settings.stages import PreferencesConfig
from mu2llm.stages.pairs import Judged, make_pairs
from mu2llm.stages.preferences import Preferences, read_pairs

KEYS = ("preferences.margin", "preferences.pairs_per_case")
"""What of `preferences` a sweep may change without new candidates."""


def superset(preferences: str, out: str, settings: PreferencesConfig) -> str:
    """Every pair that some margin and number a case would give, as a folder that `dpo` takes."""
    return derived(preferences, out, settings.model_copy(update={"margin": 0.0, "pairs_per_case": 10**6}))


def derived(preferences: str, out: str, settings: PreferencesConfig) -> str:
    """The pairs by `settings` below `out`, made unless they are there; a UserError where there are none."""
    origin = Preferences.open(preferences)
    uri = place(out, settings)
    identity = artefacts.digest([origin.identity, settings.margin, settings.pairs_per_case])
    if storage.exists(storage.join(uri, Preferences.FILE)) and Preferences.open(uri).identity == identity:
        return uri
    judged, prompt = read_judged(preferences), read_pairs(preferences)[0].prompt
    pairs: list[PreferencePair] = []
    for _, group in groupby(judged, key=lambda item: item[0].case_id):
        pairs += make_pairs(prompt, list(group), settings)[0]
    pairs += [pair for pair in read_pairs(preferences) if pair.origin == "human"]  # corrections, of no margin
    if not pairs:
        raise UserError(f"preferences.margin {settings.margin:g} leaves no pair of {preferences}")
    _write(storage.join(uri, "pairs.parquet"), PreferencePair.table(pairs))
    cases = len({pair.case_id for pair in pairs})
    changed = {"identity": identity, "pairs": len(pairs), "cases_with_pairs": cases, "dropped": {}}
    storage.write_json(storage.join(uri, Preferences.FILE), origin.model_copy(update=changed).model_dump(mode="json"))
    return uri


def place(out: str, settings: PreferencesConfig) -> str:
    """Where below `out` the pairs by these settings are."""
    return storage.join(out, f"margin{settings.margin:g}-most{settings.pairs_per_case}")


def take_reference(whole: str, part: str) -> None:
    """The part's reference log-probabilities out of the whole's; what the whole does not have, `dpo` makes itself."""
    rows = {_key(pair): row for row, pair in enumerate(read_pairs(whole))}
    pairs = read_pairs(part)
    if any(_key(pair) not in rows for pair in pairs):
        return
    for info in storage.list_files(storage.join(whole, "reference")):
        target = storage.join(part, "reference", info.base_name)
        if not storage.exists(target):
            table = _read(storage.join(whole, "reference", info.base_name)).take([rows[_key(pair)] for pair in pairs])
            numbered = table.set_column(table.column_names.index("item"), "item", pa.array(range(len(pairs))))
            _write(target, numbered)


def read_judged(preferences: str) -> list[Judged]:
    """The candidates with their judgements, by case; a UserError where the folder has pairs alone."""
    paths = [storage.join(preferences, f"{name}.parquet") for name in ("candidates", "judgements")]
    if not all(map(storage.exists, paths)):
        raise UserError(
            f"{preferences} has no judged candidates to make other pairs of; leave {' and '.join(KEYS)} out of the "
            "space (--set sweep.space.preferences=null)"
        )
    candidates, judgements = (_read(path).to_pylist() for path in paths)
    by_key = {(row["case_id"], row["index"]): Judgement.from_row(row) for row in judgements}
    records = [Candidate.from_row(row) for row in candidates]
    return [(record, by_key[record.case_id, record.index]) for record in records]


def _key(pair: PreferencePair) -> tuple[str, str, str]:
    return pair.case_id, pair.chosen, pair.rejected


def _read(uri: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(storage.read_bytes(uri)))


def _write(uri: str, table: pa.Table) -> None:
    with storage.staged(uri) as path:
        pq.write_table(table, path)

"""Pairs by other margins and numbers a case, from the same judged candidates and the same reference log-probabilities.

All pairs that any setting can give are made once, and the reference once on them; every setting takes its part.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import pyarrow as pa

from mu2llm import artefacts, storage
from mu2llm.errors import UserError
from mu2llm.records import PreferencePair
from mu2llm.settings.stages import PreferencesConfig
from mu2llm.stages.pairs import make_pairs
from mu2llm.stages.preferences import Preferences, read_judged, read_pairs

KEYS = ("preferences.margin", "preferences.pairs_per_case")
"""What of `preferences` a sweep may change without new candidates."""


def searched(keys: Iterable[str]) -> bool:
    """Whether these keys make other pairs."""
    return bool(set(KEYS) & set(keys))


def check(preferences: str, space: Iterable[str]) -> None:
    """A UserError where the keys of a space ask for other candidates, or for judged ones that are not there."""
    for key in space:
        if key.startswith("preferences.") and key not in KEYS:
            raise UserError(f"sweep.space.{key} needs other candidates: run mu2llm prefer for each, and sweep those")
    if searched(space):
        check_judged(preferences)


def place(out: str, settings: PreferencesConfig) -> str:
    """Where below `out` the pairs by these settings are."""
    return storage.join(out, f"margin{settings.margin:g}-most{settings.pairs_per_case}")


def superset(preferences: str, out: str, settings: PreferencesConfig) -> str:
    """Every pair that some margin and number a case would give, as a folder that `dpo` takes."""
    return derived(preferences, out, settings.model_copy(update={"margin": 0.0, "pairs_per_case": 10**6}))


def derived(preferences: str, out: str, settings: PreferencesConfig) -> str:
    """The pairs by `settings` below `out`, made unless they are there; a UserError where there are none."""
    check_judged(preferences)
    origin, uri = Preferences.open(preferences), place(out, settings)
    identity = artefacts.digest([origin.identity, settings.margin, settings.pairs_per_case])
    if storage.exists(storage.join(uri, Preferences.FILE)) and Preferences.open(uri).identity == identity:
        return uri
    there = read_pairs(preferences)
    pairs = [pair for pair in there if pair.origin == "human"]  # corrections, of no margin
    for _, group in groupby(read_judged(preferences), key=lambda item: item.candidate.case_id):
        pairs += make_pairs(there[0].prompt, list(group), settings)[0]
    if not pairs:
        raise UserError(f"preferences.margin {settings.margin:g} leaves no pair of {preferences}")
    storage.write_table(storage.join(uri, "pairs.parquet"), PreferencePair.table(pairs))
    cases = len({pair.case_id for pair in pairs})
    changed = {"identity": identity, "pairs": len(pairs), "cases_with_pairs": cases, "dropped": {}}
    storage.write_json(storage.join(uri, Preferences.FILE), origin.model_copy(update=changed).model_dump(mode="json"))
    return uri


def part_with_reference(preferences: str, out: str, settings: PreferencesConfig) -> str:
    """The pairs by `settings`, with their part of the reference log-probabilities that were made on all of them.

    What the reference of all does not have, `dpo` makes itself.
    """
    whole, part = superset(preferences, out, settings), derived(preferences, out, settings)
    rows = {_key(pair): row for row, pair in enumerate(read_pairs(whole))}
    taken = [rows.get(_key(pair)) for pair in read_pairs(part)]
    for info in storage.list_files(storage.join(whole, "reference")) if None not in taken else []:
        target = storage.join(part, "reference", info.base_name)
        if not storage.exists(target):
            table = storage.read_table(storage.join(whole, "reference", info.base_name)).take(taken)
            storage.write_table(
                target, table.set_column(table.column_names.index("item"), "item", pa.array(range(len(taken))))
            )
    return part


def check_judged(preferences: str) -> None:
    """A UserError where the folder has pairs alone."""
    if not all(storage.exists(storage.join(preferences, f"{name}.parquet")) for name in ("candidates", "judgements")):
        raise UserError(
            f"{preferences} has no judged candidates to make other pairs of; leave {' and '.join(KEYS)} out of the "
            "space (--set sweep.space.preferences=null)"
        )


def _key(pair: PreferencePair) -> tuple[str, str, str]:
    return pair.case_id, pair.chosen, pair.rejected

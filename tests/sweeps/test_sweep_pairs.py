"""Pairs of other margins from the same candidates, with the same reference."""

import numpy as np
import pyarrow as pa
import pytest

from mu2llm import storage
from mu2llm.errors import UserError
from mu2llm.records import PreferencePair
from mu2llm.stages.dpo import read_reference
from mu2llm.stages.preferences import Preferences, read_pairs
from mu2llm.sweeps import pairs as derived_pairs


def test_every_setting_takes_its_part_of_one_reference(pairs, least, tmp_path):
    settings = least().preferences
    whole = derived_pairs.superset(pairs, str(tmp_path), settings)
    every = read_pairs(whole)
    logps = pa.table(
        {"item": range(len(every)), "chosen": np.arange(len(every)) * 1.0, "rejected": np.arange(len(every)) * 2.0}
    )
    storage.write_table(storage.join(whole, "reference", "parent.parquet"), logps)
    part = derived_pairs.part_with_reference(pairs, str(tmp_path), settings.model_copy(update={"margin": 0.6}))
    own = read_pairs(part)
    assert 0 < len(own) < len(every)
    assert all(pair.chosen_score - pair.rejected_score >= 0.6 for pair in own)
    chosen = read_reference(storage.join(part, "reference", "parent.parquet"))[:, 0]
    assert [every[int(row)] for row in chosen] == own
    assert Preferences.open(part).identity != Preferences.open(pairs).identity


def test_corrections_are_in_the_pairs_of_every_margin(pairs, least, tmp_path):
    place = storage.join(str(tmp_path), "with")
    storage.copy(pairs, place)
    human = {"chosen_score": None, "rejected_score": None, "judge": "human", "origin": "human"}
    corrected = read_pairs(pairs)[0].model_copy(update={"chosen": "There is a nodule.", **human})
    storage.write_table(storage.join(place, "pairs.parquet"), PreferencePair.table([*read_pairs(pairs), corrected]))
    part = derived_pairs.derived(place, str(tmp_path), least().preferences.model_copy(update={"margin": 0.6}))
    assert [pair for pair in read_pairs(part) if pair.origin == "human"] == [corrected]


def test_a_margin_that_leaves_nothing_says_so(pairs, least, tmp_path):
    with pytest.raises(UserError, match="margin 2 leaves no pair"):
        derived_pairs.derived(pairs, str(tmp_path), least().preferences.model_copy(update={"margin": 2.0}))


def test_pairs_without_judged_candidates_have_no_margin_to_sweep(pairs, tmp_path):
    for name in ("pairs.parquet", Preferences.FILE):
        storage.write_bytes(str(tmp_path / name), storage.read_bytes(storage.join(pairs, name)))
    with pytest.raises(UserError, match=r"sweep\.space\.preferences=null"):
        derived_pairs.check_judged(str(tmp_path))

"""Splits by name and by hash."""

import csv

import pytest
import saved
from small_runs import case

from mu2llm import artefacts, config
from mu2llm.cases.shards import Index, ShardFile, write_index
from mu2llm.errors import UserError
from mu2llm.evaluation import splits
from mu2llm.evaluation.evaluate import request_of
from mu2llm.evaluation.splits import SELECTIONS, named, select, split_hash
from mu2llm.records import Case


def test_the_hash_is_of_ids_and_references_in_any_order():
    cases = [case(i) for i in range(5)]
    assert split_hash(cases) == split_hash(cases[::-1]) and len(split_hash(cases)) == 12
    assert split_hash(cases) != split_hash(cases[1:])
    other = cases[0].model_copy(update={"report": "Another reference."})
    assert split_hash(cases) != split_hash([other, *cases[1:]])
    spaced = cases[0].model_copy(update={"report": cases[0].report.replace(" ", "  "), "volume": "elsewhere"})
    assert split_hash(cases) == split_hash([spaced, *cases[1:]])


def test_an_unknown_or_incomplete_split_is_refused():
    with pytest.raises(UserError, match="no split of that name; there are ct-rate-valid, ct-rate-valid-chest"):
        select([case(0)], "valid")
    with pytest.raises(UserError, match="not CT-RATE's whole validation set; it has 0 studies"):
        select([case(0)], "ct-rate-valid")
    assert named([case(0)], "test") == "test"


def test_an_evaluation_takes_a_named_split_of_the_test_cases(tmp_path, monkeypatch):
    """Only `score` took them: `evaluate --split ct-rate-valid-chest` said that shards have no such split."""
    experiment = config.load("tiny")
    ids = ["valid_1_a_1", "valid_109_a_1", "valid_109_a_2", "train_3_a_1"]
    cases = [Case(id=id, patient=id, volume="", report=f"Report of {id}.", split="test") for id in ids]
    files = {"test": [ShardFile(path="test/0.parquet", rows=4, bytes=1, sha256="a")]}
    shards = write_index(str(tmp_path / "shards"), Index.of(experiment.data.spec, files), cases)
    checkpoint = saved.checkpoint(str(tmp_path / "sft"), experiment)
    monkeypatch.setitem(splits.KNOWN, artefacts.digest(["1_a"]), "ct-rate-valid-chest")
    request = request_of({"sft": checkpoint.uri}, shards, "ct-rate-valid-chest", experiment)
    assert (request.split, [case.id for case in request.cases(shards)]) == ("test", ["valid_1_a_1"])
    assert request_of({"sft": checkpoint.uri}, shards, "test", experiment).identity != request.identity


def test_ct_rates_three(shared):
    path = shared / "data" / "reports" / "ct_rate_val_1564.csv"
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cases = [Case(id=row["VolumeName"], patient="p", volume="", report=row["Findings_EN"]) for row in rows]
    sizes = {name: len(select(cases, name)) for name in SELECTIONS}
    assert sizes == {"ct-rate-valid": 1564, "ct-rate-valid-chest": 1551, "ct-rate-valid-distinct": 1493}
    assert len({each.report for each in select(cases, "ct-rate-valid-distinct")}) == 1493
    for name in SELECTIONS:
        assert named(select(cases, name), "validation") == name
    volumes = shared / "data" / "manifests" / "ct_rate" / "validation_metadata.FULL_REAL.csv"
    with volumes.open(encoding="utf-8") as file:
        whole = [Case(id=row["VolumeName"], patient="p", volume="", report="") for row in csv.DictReader(file)]
    assert (len(whole), named(whole, "validation")) == (3039, "ct-rate-valid")
    assert len(select(whole, "ct-rate-valid-chest")) == 3039 - 64

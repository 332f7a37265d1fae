"""`mu2llm clean`: what is needed stays, whoever needs it; what nobody refers to is listed, and goes when asked."""

import json
import os
import time
from pathlib import Path

import pytest
import saved

from mu2llm import cleaning, storage, tracking
from mu2llm.errors import UserError
from mu2llm.places import Places
from mu2llm.stages.preferences import Preferences


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mu2llm.db")
    return tmp_path / "runs"


def write(path, text="{}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def shards(folder):
    write(folder / "shards.json")
    write(folder / "train" / "00000-abc.parquet", "x" * 1000)


def checkpoint(folder, stage="sft", data=None, parent=None, value=0.0):
    return saved.checkpoint(folder, value=value, stage=stage, data=data and str(data), parent=parent and str(parent))


def pairs(folder, made_on, made_by="c", **more):
    values = {
        **{"shards": str(made_on), "data_checksum": "", "spec_hash": "s", "split": "train", "checkpoint": str(made_by)},
        **{"judge": "rules", "identity": "i", "cases": 1, "candidates": 2, "pairs": 1, "cases_with_pairs": 1},
        **{"dropped": {}, "green_best": 1.0, "green_worst": 0.0, **more},
    }
    write(folder / Preferences.FILE, json.dumps(values))


def found(root, days=0):
    return {(each.kind, each.uri.removeprefix(f"{root}/")) for each in cleaning.find(str(root), days)}


def test_what_checkpoints_came_from_stays(root):
    for name in ("used", "by-pairs", "unused"):
        shards(root / name)
    pairs(root / "pairs", root / "by-pairs")
    pairs(root / "other-pairs", root / "used")
    checkpoint(root / "sft", data=root / "used")
    checkpoint(root / "dpo", "dpo", data=root / "pairs", parent=root / "sft")
    assert found(root) == {("shards", "unused"), ("preferences", "other-pairs")}


def test_corrected_scans_stay_as_long_as_their_pairs(root):
    shards(root / "shards")
    shards(root / "pairs" / "corrected")
    pairs(root / "pairs", root / "shards", corrected=str(root / "pairs" / "corrected"))
    assert found(root) == {("shards", "shards"), ("preferences", "pairs")}
    checkpoint(root / "dpo", "dpo", data=root / "pairs")
    assert found(root) == set()


def test_what_a_registered_checkpoint_elsewhere_came_from_stays(root, tmp_path):
    shards(root / "shards")
    elsewhere = checkpoint(tmp_path / "elsewhere" / "sft", data=root / "shards")
    assert found(root) == {("shards", "shards")}
    tracking.register(elsewhere)
    assert found(root) == set()


def test_caches_states_and_halves(root):
    made = checkpoint(root / "sft", data=root / "shards")
    shards(root / "shards")
    write(root / "shards" / "features" / "kept" / "shards.json", json.dumps({"checkpoint": made.uri}))
    write(root / "shards" / "features" / "gone" / "shards.json", json.dumps({"checkpoint": str(root / "nowhere")}))
    write(root / "sft.state" / "identity.json")
    write(root / "interrupted.state" / "identity.json")
    write(root / "evaluation" / "predictions.state" / "batch.parquet")
    write(root / "evaluation" / "metrics.json")
    write(root / "running" / "predictions.state" / "batch.parquet")
    write(root / "shards" / "train" / f".00001-abc.parquet.{os.getpid()}.0123abcd", "half")
    assert found(root) == {
        ("features", "shards/features/gone"),
        ("state", "sft.state"),
        ("state", "evaluation/predictions.state"),
        ("partial", f"shards/train/.00001-abc.parquet.{os.getpid()}.0123abcd"),
    }


def test_features_of_scans_that_changed_are_listed(root):
    made = checkpoint(root / "sft", data=root / "shards")
    shards(root / "shards")
    write(root / "shards" / "shards.json", json.dumps({"checksum": "now"}))
    for checksum in ("now", "before"):
        index = {"checkpoint": made.uri, "parent_checksum": checksum}
        write(root / "shards" / "features" / checksum / "shards.json", json.dumps(index))
    assert found(root) == {("features", "shards/features/before")}


def test_steps_of_an_earlier_configuration_are_listed_once_a_run_without_them_has_finished(root):
    """A pipeline made SFT, pairs and DPO, then all of it again with another learning rate."""
    places = Places.open(str(root))

    def made(identity, contrastive, value):
        names = ("checkpoints/contrastive", "checkpoints/sft", "preferences", "checkpoints/dpo", "evaluation")
        identities = (contrastive, *[identity] * 4)
        vision, sft, pairs_, dpo, evaluation = (
            Path(places.take(str(root / name), each)) for name, each in zip(names, identities, strict=True)
        )
        checkpoint(vision, "contrastive", root / "shards")
        checkpoint(sft, "sft", root / "shards", vision, value)
        pairs(pairs_, root / "shards", sft)
        write(evaluation / "metrics.json")
        return checkpoint(dpo, "dpo", pairs_, sft, value)

    shards(root / "shards")
    started = time.time()
    first = made("one", "vision", 1.0)
    places.finished(started)
    assert found(root) == set()
    started = time.time()
    made("two", "vision", 2.0)
    assert found(root) == set()  # the run has not come to its end
    places.finished(started)
    assert found(root) == {
        ("step", name) for name in ("checkpoints/sft", "preferences", "checkpoints/dpo", "evaluation")
    }
    tracking.register(first)  # what the registry came from stays, its evaluation is of no use to it
    assert found(root) == {("step", "evaluation")}


def test_what_is_young_stays(root):
    shards(root / "old")
    shards(root / "young")
    before = time.time() - 3 * cleaning.DAY_S
    for path in (root / "old").rglob("*"):
        os.utime(path, (before, before))
    assert found(root, days=1) == {("shards", "old")}


def test_it_lists_and_only_removes_when_asked(root):
    from typer.testing import CliRunner

    from mu2llm import cli

    shards(root / "unused")
    listed = CliRunner().invoke(cli.app, ["clean", str(root), "--older-than", "0", "--json"])
    assert listed.exit_code == 0, listed.output
    told = json.loads(listed.stdout)
    assert (told["removed"], [each["kind"] for each in told["found"]]) == (False, ["shards"])
    assert told["bytes"] >= 1000
    assert storage.exists(str(root / "unused" / "shards.json"))
    removed = CliRunner().invoke(cli.app, ["clean", str(root), "--older-than", "0", "--yes"])
    assert removed.exit_code == 0
    assert "unused" in removed.output
    assert not storage.exists(str(root / "unused"))


def test_nothing_is_removed_where_the_registry_cannot_be_asked(root, monkeypatch):
    shards(root / "unused")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(Exception, match="127"):
        cleaning.find(str(root), 0)


def test_a_wrong_uri_is_told(root):
    with pytest.raises(UserError, match="nothing to look through"):
        cleaning.find(str(root / "typo"))

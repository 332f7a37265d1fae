"""What all commands share."""

import json
import os
import shlex

import pytest
import yaml
from typer.testing import CliRunner

from mu2llm import config, tracking
from mu2llm.cli import app, reports
from mu2llm.cli.app import print_scan, show, work_on_ray
from mu2llm.engine import scans
from mu2llm.tracking.client import client


def test_what_ray_prints_meanwhile_does_not_reach_the_result(ray_cluster, capsys):
    with work_on_ray(None):
        print("(raylet) a message of another driver's")
    show({"steps": 3}, as_json=True)
    told = capsys.readouterr()
    assert told.out == '{"steps": 3}\n'
    assert "(raylet)" in told.err


@pytest.mark.parametrize("text", ["a [left].nii.gz", "x[/y].nii.gz", "nodule [series 2, image 41]", "[bold]x[/bold]"])
def test_texts_and_paths_are_printed_as_they_are(text, capsys):
    print_scan(text, f"Findings: {text}")
    show({text: text}, as_json=False)
    assert " ".join(capsys.readouterr().out.split()).count(text) == 4


def test_generate_prints_brackets_as_they_are(monkeypatch):
    class Opened:
        experiment = config.load("tiny").model_dump(mode="json")

    entry = {"path": "x[/y].nii.gz", "report": "nodule [series 2, image 41]", "familiarity": None}
    monkeypatch.setattr(reports, "open_checkpoint", lambda uri: Opened)
    monkeypatch.setattr(scans, "report_scans", lambda *_: [entry])
    done = CliRunner().invoke(app, ["generate", "--checkpoint", "c", "x[/y].nii.gz"])
    assert done.exit_code == 0 and entry["path"] in done.stdout and entry["report"] in done.stdout


@pytest.mark.parametrize(
    ("familiarity", "said"),
    [
        ({"percentile": 100.0, "unlike": True}, "unlike the training scans (farther than 100 % of them)"),
        ({"percentile": 40.0, "unlike": False}, ""),
        (None, "the checkpoint keeps no statistics"),
    ],
)
def test_generate_says_which_scan_is_unlike_the_training_scans(monkeypatch, familiarity, said):
    class Opened:
        experiment = config.load("tiny").model_dump(mode="json")

    entry = {"path": "x.nii.gz", "report": "Clear.", "familiarity": familiarity}
    monkeypatch.setattr(reports, "open_checkpoint", lambda uri: Opened)
    monkeypatch.setattr(scans, "report_scans", lambda *_: [entry])
    shown = CliRunner().invoke(app, ["generate", "--checkpoint", "c", "x.nii.gz"]).stdout
    assert said in " ".join(shown.split()) and ("training scans" in shown or "statistics" in shown) == bool(said)


def test_generate_lists_the_rows_of_a_manifest_that_it_cannot_use(monkeypatch, tmp_path):
    """They were left out without a word."""

    class Opened:
        experiment = config.load("tiny").model_dump(mode="json")

    (tmp_path / "a.nii.gz").write_bytes(b"x")
    rows = [{"id": name, "volume": f"{name}.nii.gz"} for name in ("a", "gone")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(reports, "open_checkpoint", lambda uri: Opened)
    monkeypatch.setattr(
        scans, "report_scans", lambda _, places, *rest: [{"path": each.path, "report": ""} for each in places]
    )
    words = ["generate", "--checkpoint", "c", "--manifest", f"{tmp_path}/m.jsonl", "--volumes", str(tmp_path), "--json"]
    written, refused = json.loads(CliRunner().invoke(app, words).stdout)
    assert written["path"].endswith("a.nii.gz") and refused["path"].endswith("gone.nii.gz")
    assert refused["rejected"] == "not_found"


def test_generate_reads_what_is_asked_for(monkeypatch, tmp_path):
    """A manifest's series and rescale were not heeded: the largest series was read, raw values were taken as HU."""

    class Opened:
        experiment = config.load("tiny").model_dump(mode="json")

    (tmp_path / "a.nii.gz").write_bytes(b"x")
    row = {"id": "a", "volume": "a.nii.gz", "series": "1.2#2", "rescale": [1, -8192]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    seen = []
    monkeypatch.setattr(reports, "open_checkpoint", lambda uri: Opened)
    monkeypatch.setattr(scans, "report_scans", lambda _, places, *rest: seen.extend(places) or [])
    words = ["generate", "--checkpoint", "c", "study", "--series", "thin#2", "--manifest", f"{tmp_path}/m.jsonl"]
    assert CliRunner().invoke(app, [*words, "--volumes", str(tmp_path), "--json"]).exit_code == 0
    named = scans.ScanPlace(f"{tmp_path}/a.nii.gz", "1.2#2", (1, -8192))
    assert seen == [scans.ScanPlace("study", "thin#2"), named]


@pytest.mark.parametrize(
    "command",
    [
        "train sft --data shards --init c --out o --preset tiny --dry-run",
        "evaluate --checkpoint c --data shards --out o --preset tiny --dry-run",
        "prefer --checkpoint c --data shards --out o --preset tiny --dry-run",
    ],
)
def test_relative_places_are_those_where_the_command_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = yaml.safe_load(CliRunner().invoke(app, shlex.split(command)).stdout)
    assert sorted(planned["reads"]) == [f"{tmp_path}/c", f"{tmp_path}/shards"]


@pytest.mark.parametrize("name", ["what? now", "100%", "a%20b #1", "plain"])
def test_the_tracking_store_lies_in_the_working_directory(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client(tracking.store()).search_experiments()
    assert os.listdir(".") == ["mu2llm.db"] and os.listdir(tmp_path) == [name]

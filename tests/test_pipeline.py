"""One real demo at its smallest size: every stage, then again with other settings (test_pipeline_steps: the logic)."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mu2llm import green, storage
from mu2llm.artefacts import open_checkpoint
from mu2llm.cli import app
from mu2llm.ct import phantom

pytestmark = pytest.mark.slow


# of the three stages SFT shows that Ray Train works here: each more starts ten processes, and is tested by itself
HERE = ["--set", "contrastive.workers=0", "--set", "dpo.workers=0"]


def demo(folder, *more):
    """`mu2llm demo` as a user runs it: an S3 server and a Ray of its own."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mu2llm.db"}
    command = [Path(sys.executable).parent / "mu2llm", "demo", "--preset", "tiny", *HERE, "--json"]
    command += ["--out", folder / "out", *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, summary) of preset tiny, with two scans to report: one CT, one that is none."""
    folder = tmp_path_factory.mktemp("demo")
    scan = folder / "scan.nii.gz"
    rng = np.random.default_rng(0)
    hu = np.full((40, 40, 30), -1000.0)
    hu[8:32, 8:32] = rng.normal(40, 20, (24, 24, 30))
    nib.save(nib.Nifti1Image(hu.astype(np.int16), np.diag([5.0, 5.0, 5.0, 1.0])), scan)
    broken = folder / "broken.nii.gz"
    broken.write_bytes(b"\x1f\x8b\x08 not a scan")
    return folder, demo(folder, "--scan", scan, "--scan", broken)


def test_the_summary_has_what_checks_read(finished):
    folder, summary = finished
    assert json.loads((folder / "out" / "summary.json").read_text())["seconds"] == summary["seconds"]
    for stage in ("phantoms", "ingest", "contrastive", "sft", "preferences", "dpo", "evaluate", "total"):
        assert summary["seconds"][stage] > 0
    assert 0.1 < summary["peak_memory_gib"] < 24
    trained = open_checkpoint(summary["checkpoints"]["contrastive"]).training.metrics
    assert summary["contrastive"]["recall_at_1"] == trained["recall_at_1"]
    assert summary["contrastive"]["chance_at_1"] == pytest.approx(1 / summary["ingest"]["splits"]["validation"])
    for run in ("sft", "dpo"):
        for metric in ("finding_f1", "bleu_1", "rouge_l"):
            estimate = summary[run][metric]
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
            assert estimate["n"] == summary["ingest"]["splits"]["test"]
        assert summary[run]["finding_f1_shuffled"]["n"] == summary["ingest"]["splits"]["test"]
        assert summary[run]["distinct_reports"] * summary["ingest"]["splits"]["test"] >= 1  # one text at least
    assert {"value", "low", "high"} <= summary["dpo_minus_sft"]["rouge_l"].keys()
    assert (folder / "out" / "report.html").stat().st_size > 10_000


def test_checkpoints_can_be_read_when_no_server_runs(finished):
    _, summary = finished
    for stage in ("contrastive", "sft", "dpo"):
        checkpoint = open_checkpoint(summary["checkpoints"][stage])
        assert checkpoint.lineage.stage == stage
        assert checkpoint.training.steps > 0
        assert Path(checkpoint.lineage.data).exists()
        assert not storage.exists(summary["checkpoints"][stage] + ".state")
    assert open_checkpoint(summary["checkpoints"]["dpo"]).lineage.parent == summary["checkpoints"]["sft"]
    assert not list(Path(summary["checkpoints"]["dpo"]).glob("*.bin"))


def test_scans_are_reported_or_refused_with_a_reason(finished):
    _, summary = finished
    scan, broken = summary["scans"]
    assert isinstance(scan["report"], str)
    assert broken["rejected"]


def test_another_run_does_again_what_its_settings_decide_beside_what_is_there(finished):
    folder, summary = finished
    before, files = times(folder), contents(folder)
    execution = ("sft.log_steps=7", "sft.workers=2", "evaluation.pages=3", "preferences.batch_size=3")
    again = demo(folder, *(part for each in execution for part in ("--set", each)))
    assert again["seconds"] == summary["seconds"] and again["checkpoints"] == summary["checkpoints"]
    assert times(folder) == before
    assert changed(folder, files) == {"evaluation/report.html", "evaluation/metrics.json"}
    other = demo(folder, "--set", "sft.learning_rate=0.001")
    ours, theirs = other["checkpoints"], summary["checkpoints"]
    assert {stage for stage in ("contrastive", "sft", "dpo") if ours[stage] == theirs[stage]} == {"contrastive"}
    assert open_checkpoint(other["checkpoints"]["sft"]).experiment["sft"]["learning_rate"] == 0.001
    kept = {name: at for name, at in times(folder).items() if name in before and name != "register"}
    assert kept == {name: at for name, at in before.items() if name != "register"}
    assert changed(folder, files) == {"evaluation/report.html", "evaluation/metrics.json"}  # of the run before


def times(folder):
    """When each step was finished."""
    steps = (folder / "out" / "steps").glob("*.json")
    return {path.stem: path.stat().st_mtime_ns for path in steps if path.stem not in ("peak", "places")}


def contents(folder):
    """Digest of every file that steps made: of checkpoints, pairs, evaluation and shards."""
    out = folder / "out"
    made = [path for name in ("checkpoints", "preferences", "evaluation", "s3") for path in (out / name).rglob("*")]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in made if p.is_file()}


def changed(folder, files):
    """The files that are gone or another's now."""
    now = contents(folder)
    return {name for name, digest in files.items() if now.get(name) != digest}


def shaped_as_ct_rate(folder):
    """Phantoms in CT-RATE's folders under its names, with its three tables: 18 training and 6 `valid` patients."""
    rows = [json.loads(line) for line in Path(phantom.write(str(folder / "raw"), 24, 0)).read_text().splitlines()]
    tables = {"reports": [], "metadata": [], "labels": []}
    for number, row in enumerate(rows, 1):
        part = "train" if number <= 18 else "valid"
        study = f"{part}_{number}_a"
        volume = folder / "dataset" / part / f"{part}_{number}" / study / f"{study}_1.nii.gz"
        volume.parent.mkdir(parents=True)
        (folder / "raw" / row["volume"]).rename(volume)
        tables["reports"].append(
            {"VolumeName": volume.name, "Findings_EN": row["report"], "Impressions_EN": "Not given."}
        )
        tables["metadata"].append({"VolumeName": volume.name, "RescaleSlope": 1, "RescaleIntercept": -1024})
        tables["labels"].append({"VolumeName": volume.name, **green.labels(row["report"])})
    for name, each in tables.items():
        with (folder / "dataset" / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, each[0])
            writer.writeheader()
            writer.writerows(each)
    return str(folder / "dataset")


def test_a_folder_of_ct_rate_goes_the_whole_way_and_is_evaluated_on_its_valid_cases(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mu2llm.db")
    folder = shaped_as_ct_rate(tmp_path)
    here = [*HERE, "--set", "sft.workers=0", "--set", "evaluation.regions=false"]
    command = ["pipeline", "--format", "ct-rate", "--manifest", folder, "--volumes", folder, "--preset", "tiny"]
    done = CliRunner().invoke(app, [*command, *here, "--out", str(tmp_path / "out"), "--json"], catch_exceptions=False)
    summary = json.loads(done.stdout)
    assert (
        summary["ingest"]["splits"]["test"] == 6 == summary["dpo"]["green"]["n"] and summary["ingest"]["rejected"] == {}
    )
    assert summary["ingest"]["splits"]["validation"] > 0 and sum(summary["ingest"]["splits"].values()) == 24
    cases = pq.read_table(tmp_path / "out" / "evaluation" / "cases.parquet").column("id").to_pylist()
    assert sorted(cases) == sorted(f"valid_{n}_a_1" for n in range(19, 25))
    assert json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text())["split_hash"]

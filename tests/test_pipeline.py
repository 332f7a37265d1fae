"""The whole way at its smallest size: every stage for real, then once more, which does nothing again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mu2llm import config, pipeline, storage, tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.errors import UserError
from mu2llm.records import Checkpoint, Lineage

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


def test_what_no_pipeline_made_is_not_deleted(tmp_path):
    """Shards ingested by hand into the --out of a pipeline of another spec were gone."""
    theirs = tmp_path / "shards" / "train.parquet"
    theirs.parent.mkdir()
    theirs.write_text("terabytes")
    steps = pipeline.Pipeline(str(tmp_path), config.load("tiny"), lambda *_: None)
    with pytest.raises(UserError, match="no pipeline made it"):
        steps.step("ingest", 1, dict, [str(theirs.parent)])
    pipeline.clear(str(tmp_path))
    assert theirs.read_text() == "terabytes"


def test_a_step_that_was_killed_while_it_made_room_goes_on(tmp_path, monkeypatch):
    out, made = str(tmp_path / "out"), str(tmp_path / "out" / "made")

    def step(decides):
        steps = pipeline.Pipeline(out, config.load("tiny"), lambda *_: None)
        return steps.step("work", decides, lambda: storage.write_json(made, decides) or {"made": decides}, [made])

    step(1)
    delete = storage.delete

    def killed(uri):
        if uri == made:
            raise KeyboardInterrupt
        delete(uri)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            step(2)
    assert step(2) == {"made": 2} and storage.read_json(made) == 2


def test_an_alias_does_not_go_over_to_the_checkpoint_that_takes_the_place(tmp_path, monkeypatch):
    """A champion's folder was trained into again, and the registry then named a model that no audit had passed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mu2llm.db")
    out, made = str(tmp_path / "out"), str(tmp_path / "out" / "checkpoints" / "dpo")

    def train():
        lineage = Lineage(stage="dpo", spec_hash="x", identity="a")
        checkpoint = Checkpoint(uri=made, experiment={}, lineage=lineage)
        storage.write_json(storage.join(made, Checkpoint.FILE), checkpoint.model_dump(mode="json"))
        return {}

    def step(decides):
        pipeline.Pipeline(out, config.load("tiny"), lambda *_: None).step("dpo", decides, train, [made])

    step(1)
    tracking.register(open_checkpoint(made), alias="champion")
    step(1)
    assert tracking.aliases() == {"champion": made}
    step(2)
    assert tracking.aliases() == {}


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


def test_a_second_run_does_nothing_again(finished):
    folder, summary = finished
    before = times(folder)
    assert demo(folder)["seconds"] == summary["seconds"]
    assert times(folder) == before


def times(folder):
    """When each step was finished."""
    steps = (folder / "out" / "steps").glob("*.json")
    return {path.stem: path.stat().st_mtime_ns for path in steps if path.stem != "peak"}

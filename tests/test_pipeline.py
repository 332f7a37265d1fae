"""One real demo at its smallest size, every stage of it; which steps another run does is in test_pipeline_steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mu2llm import storage
from mu2llm.artefacts import open_checkpoint

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

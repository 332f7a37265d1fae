"""A head and two workers as processes of their own: ingest and SFT over both, one dies in the middle, another comes."""

import json
import time
from pathlib import Path

import pytest
from hosts import Hosts, mu2llm

from mu2llm.artefacts import open_checkpoint
from mu2llm.ct import phantom

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # three nodes on two cores, beside other tests
STEPS, BATCH = 24, 4


def test_a_job_outlives_a_node(tmp_path):
    scans, shards, out = tmp_path / "scans", tmp_path / "shards", tmp_path / "sft"
    phantom.write(str(scans), 24, 0)
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mu2llm.db"}
    # one CPU a node, none on the head: the two training workers are on two nodes
    with Hosts(0, store) as hosts:
        workers = [hosts.worker(1), hosts.worker(1)]
        hosts.wait_for(3)
        manifest = ["--manifest", scans / "manifest.jsonl", "--volumes", scans]
        done = mu2llm(hosts, "submit", "ingest", "--preset", "tiny", *manifest, "--out", shards)
        assert done.returncode == 0, done.stderr[-3000:]

        settings = {
            **{"workers": 2, "max_steps": STEPS, "batch_size": BATCH, "save_steps": 2, "log_steps": 2},
            **{"freeze_vision": "false", "max_failures": 3},
        }
        overrides = [word for name, value in settings.items() for word in ("--set", f"sft.{name}={value}")]
        stage = ["sft", "--preset", "tiny", *overrides, "--data", shards, "--out", out]
        sent = mu2llm(hosts, "submit", *stage, "--no-wait", "--json")
        assert sent.returncode == 0, sent.stderr[-3000:]
        job = json.loads(sent.stdout)["job"]

        wait_for_checkpoint(Path(f"{out}.state"))
        workers[0].kill()
        hosts.worker(1)
        followed = mu2llm(hosts, "jobs", "logs", job, timeout=500)
        assert followed.returncode == 0, followed.stdout[-5000:] + followed.stderr[-2000:]

    checkpoint = open_checkpoint(str(out))
    training = checkpoint.training
    assert training.steps == STEPS
    assert 0 < training.resumed_from_step < STEPS
    assert training.cases_seen == STEPS * BATCH  # none lost, none counted twice
    assert not Path(f"{out}.state").exists()


def wait_for_checkpoint(state: Path, timeout_s: float = 300) -> None:
    """Until the stage has an intermediate checkpoint that all workers have reported: one it can go on from."""
    snapshot = state / "train" / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + timeout_s
    while not (snapshot.exists() and "checkpoint_2" in snapshot.read_text()):
        assert time.monotonic() < deadline, f"no intermediate checkpoint: {list(state.rglob('*'))}"
        time.sleep(0.3)

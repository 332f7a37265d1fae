"""A head and two workers as processes of their own: SFT over both, one dies in the middle, another comes."""

import json
import time
from pathlib import Path

import pytest
from hosts import mu2llm

from mu2llm.artefacts import open_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # three nodes on two cores, beside other tests
STEPS, BATCH = 24, 4


def test_a_job_outlives_a_node(head, ingested, tmp_path):
    (shards, _), out = ingested, tmp_path / "sft"
    # three CPUs a worker, of which the head has two: the two training workers are on two nodes
    workers = [head.worker(3), head.worker(3)]
    try:
        head.wait_for(3)
        settings = {
            **{"workers": 2, "cpus_per_worker": 3, "max_steps": STEPS, "batch_size": BATCH, "save_steps": 2},
            **{"log_steps": 2, "freeze_vision": "false", "max_failures": 3},
        }
        overrides = [word for name, value in settings.items() for word in ("--set", f"sft.{name}={value}")]
        stage = ["sft", "--preset", "tiny", *overrides, "--data", shards, "--out", out]
        sent = mu2llm(head, "submit", *stage, "--no-wait", "--json")
        assert sent.returncode == 0, sent.stderr[-3000:]
        job = json.loads(sent.stdout)["job"]

        wait_for_checkpoint(head, job, Path(f"{out}.state"))
        workers[0].kill()
        workers.append(head.worker(3))
        followed = mu2llm(head, "jobs", "logs", job)
        assert followed.returncode == 0, followed.stdout[-5000:] + followed.stderr[-2000:]
    finally:
        for worker in workers:
            worker.kill()
        head.wait_for(1)

    checkpoint = open_checkpoint(str(out))
    training = checkpoint.training
    assert training.steps == STEPS
    assert 0 < training.resumed_from_step < STEPS
    assert training.cases_seen == STEPS * BATCH  # none lost, none counted twice
    assert not Path(f"{out}.state").exists()


def wait_for_checkpoint(head, job: str, state: Path) -> None:
    """Until the stage has an intermediate checkpoint that all workers have reported: one it can go on from."""
    snapshot = state / "train" / "checkpoint_manager_snapshot.json"
    while not (snapshot.exists() and "checkpoint_2" in snapshot.read_text()):
        assert head.job(job)["status"] in ("PENDING", "RUNNING"), head.job(job)["message"]
        time.sleep(0.1)

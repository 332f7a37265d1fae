"""Real sweeps of a few tiny trials: killed and resumed, one that cannot be trained, on Train workers; the ablation."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mu2llm import storage
from mu2llm.cases import Shards
from mu2llm.errors import UserError
from mu2llm.stages.job import Watch
from mu2llm.sweeps import ablation, dpo, tokenizer
from mu2llm.sweeps.runner import run_points
from mu2llm.sweeps.sweep import plan_of
from mu2llm.sweeps.trial import Trial

pytestmark = pytest.mark.slow

TOKENIZER = [
    *(f"sweep.space.model.tokenizer.{key}=null" for key in ("scales", "temperature", "attention", "num_layers")),
    "sweep.space.model.tokenizer.top_k={choice: [4, 8]}",
    "sweep.space.model.tokenizer.queries={choice: [2, 4]}",
    "sweep.space.model.tokenizer.num_heads={choice: [2, 3]}",
    "sweep.first=[{model.tokenizer.num_heads: 3}]",  # does not divide 32: this trial cannot be trained
]
DPO = ["sweep.space.dpo.learning_rate=null", "sweep.space.preferences.pairs_per_case={choice: [1, 2]}"]


def killed_after_one_trial(out, preset, kind, overrides, *arguments):
    """Runs the command until it has a finished trial, then kills it without warning; the record of that trial."""
    sets = [part for each in overrides for part in ("--set", each)]
    command = ["sweep", kind, "--out", out, "--preset", preset, "--final-seeds", "0", *sets, *arguments]
    run = subprocess.Popen(
        [sys.executable, "-c", "from mu2llm.cli import main; main()", *command],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (ended := list(Path(out).glob("trials/*.json"))):
        assert run.poll() is None, run.stderr.read().decode()
        assert time.monotonic() < deadline, "no trial ended"
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    run.stderr.close()
    return ended[0], ended[0].read_bytes()


def test_a_tokenizer_sweep_that_is_killed_goes_on(ray_cluster, shards, vision, preset, least, tmp_path):
    out = str(tmp_path / "sweep")
    record, before = killed_after_one_trial(
        out, preset, "tokenizer", TOKENIZER, "--data", shards.uri, "--init", vision, "--trials", "3"
    )
    given = least(*TOKENIZER, "sweep.trials=3", "sweep.final_seeds=2", "sweep.objective=[green]")
    with pytest.raises(UserError, match="--resume goes on"):
        tokenizer.sweep(shards.uri, vision, out, given)
    with pytest.raises(UserError, match="another configuration"):
        tokenizer.sweep(shards.uri, vision, out, least(*TOKENIZER, "sft.epochs=3"), resume=True)
    found = tokenizer.sweep(shards.uri, vision, out, given, resume=True)
    assert record.read_bytes() == before
    trials = Trial.read_all(out)
    assert len(trials) == found["trials"] == 3
    broken = [trial for trial in trials if trial.point.params["model.tokenizer.num_heads"] == 3]
    assert broken and all(trial.status in ("infeasible", "failed") and "divide" in trial.why for trial in broken)
    done = [trial for trial in trials if trial.status == "done"]
    assert done
    assert all([entry["step"] for entry in trial.history] == [3, 6] for trial in done)
    assert all(trial.metrics["visual_tokens"] == trial.point.params["model.tokenizer.queries"] for trial in done)
    assert len(done) + len(broken) + sum(trial.status == "stopped" for trial in trials) == 3
    table = pq.read_table(f"{out}/leaderboard.parquet")
    assert table.num_rows == 3
    page = Path(out, "sweep.html").read_text()
    assert Path(out, "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert all(title in page for title in ("Optimisation history", "Learning curves", "Winner and default"))
    assert "http" not in page.replace("http://www.w3.org", "")
    assert found["final"]["seeds"] == [100, 101]
    assert len(found["final"]["by_seed"]["winner"]["green"]) == 2
    again = tokenizer.sweep(shards.uri, vision, out, given, resume=True)
    assert again["final"] == found["final"]
    assert again["best"] == found["best"]


def test_a_dpo_sweep_that_is_killed_goes_on(ray_cluster, pairs, written, shards, preset, least, tmp_path):
    out = str(tmp_path / "sweep")
    objective = ("--objective", "green", "--objective", "kl")
    record, before = killed_after_one_trial(
        out, preset, "dpo", DPO, "--data", pairs, "--init", written, "--trials", "3", *objective
    )
    given = least(*DPO, "sweep.trials=3", "sweep.objective=[green,kl]")
    found = dpo.sweep(pairs, written, out, given, resume=True)
    assert record.read_bytes() == before
    trials = Trial.read_all(out)
    assert len(trials) == 3
    assert all(trial.metrics["kl"] >= 0 for trial in trials if trial.status == "done")
    assert found["front"]
    # the reference was computed once, for all pairs that any trial could use
    computed = list(Path(out, "pairs").glob("*/reference/*.parquet"))
    assert len({path.name for path in computed}) == 1
    assert not list(Path(pairs).glob("reference/*"))


def test_a_trial_on_train_workers_reports_the_same(ray_cluster, shards, vision, least, tmp_path):
    """The thin driver and the trial that trains by itself give the same numbers."""
    metrics = []
    for workers in (1, 0):
        given = least(*TOKENIZER, f"sweep.workers_per_trial={workers}", "data.fraction=0.5")
        sweep = tokenizer.plan(shards.uri, vision, str(tmp_path / str(workers)), given)
        tokenizer.share(given, shards, vision)
        plan = plan_of(sweep, None, Watch(times=2))
        (trial,) = run_points(plan, [sweep.start], given.sweep)
        assert trial.status == "done", trial.why
        assert [entry["step"] for entry in trial.history] == [2, 3]
        metrics.append((trial.metrics["green"], trial.metrics["finding_f1"], trial.metrics["n"]))
    assert metrics[0] == metrics[1]


def test_a_sweep_that_cannot_work_is_refused_before_it_starts(ray_cluster, shards, vision, written, least, tmp_path):
    calls = {
        "lower --workers-per-trial": (vision, least("sweep.workers_per_trial=999")),
        "starts from a contrastive": (written, least()),
        "it is for mu2llm sweep dpo": (vision, least("sweep.objective=[kl]")),
        "name the preset": (vision, least("data.spec.grid=[8,16,32]")),
    }
    for says, (init, given) in calls.items():
        with pytest.raises(UserError, match=says):
            tokenizer.sweep(shards.uri, init, str(tmp_path / "none"), given)
    assert not (tmp_path / "none").exists()


def test_the_ablation_says_what_each_part_gives(ray_cluster, shards, vision, least, tmp_path):
    out = str(tmp_path / "ablation")
    found = ablation.run(shards.uri, vision, out, least(), seeds=1, fractions=(1.0,))
    assert [cell["variant"] for cell in found["cells"]] == [*ablation.VARIANTS, ablation.DPO]
    cells = {cell["variant"]: cell for cell in found["cells"]}
    assert cells["baseline"]["published"]["green"] == 0.204
    assert cells["all"]["minus_baseline"]["green"]["n"] == Shards.open(shards.uri).count("test")
    assert storage.exists(storage.join(out, "ablation.html"))
    assert storage.exists(storage.join(out, "ablation.png"))
    records = {path: path.read_bytes() for path in Path(out).glob("*/trials/*.json")}
    assert len(records) == 6
    again = ablation.run(shards.uri, vision, out, least(), seeds=1, fractions=(1.0,))
    assert json.dumps(again["cells"]) == json.dumps(found["cells"])
    assert {path: path.read_bytes() for path in Path(out).glob("*/trials/*.json")} == records


def test_a_share_of_the_patients_is_whole_patients_and_grows(shards):
    few, more = (shards.subset("train", fraction, seed=1) for fraction in (0.34, 0.67))
    assert set(few) < set(more) < {case.id for case in shards.cases("train")}
    patients = {case.id: case.patient for case in shards.cases("train")}
    chosen = {patients[name] for name in few}
    assert sorted(few) == sorted(name for name, patient in patients.items() if patient in chosen)
    assert shards.subset("train", 0.34, seed=2) != few

"""A real sweep, killed, moved and resumed; a trial on Train workers against one in its own process; what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mu2llm.errors import UserError
from mu2llm.sweeps import sweep
from mu2llm.sweeps.runner import run_trials
from mu2llm.sweeps.study import JOURNAL, Study, database
from mu2llm.sweeps.trial import Point, run

SPACE = [
    "sweep.space.dpo.learning_rate=null",
    "sweep.space.dpo.beta={choice: [0.1, 0.5]}",
    "sweep.space.preferences.margin={choice: [0.05, 1.5]}",
    "sweep.space.preferences.pairs_per_case={choice: [1, 2]}",
    # the first leaves no pair and cannot be trained; the second can, whatever the search draws after a kill
    "sweep.first=[{preferences.margin: 1.5}, {preferences.margin: 0.05}]",
    "sweep.objective=[green,kl]",
]


def killed_after_one_trial(out, preset, *arguments):
    """Runs the command until a trial is recorded, then kills it without warning; the study's journal by then."""
    sets = [part for each in SPACE for part in ("--set", each)]
    command = ["sweep", "dpo", "--out", out, "--preset", preset, "--final-seeds", "0", *sets, *arguments]
    command = [sys.executable, "-c", "from mu2llm.cli import main; main()", *command]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with open(f"{out}.log", "wb") as log:
        run = subprocess.Popen(command, env=environment, stderr=log, start_new_session=True)
    journal = Path(out, JOURNAL)
    while not (journal.exists() and b'"record"' in journal.read_bytes()):
        assert run.poll() is None, Path(f"{out}.log").read_text()
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return journal.read_bytes()


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_moved_goes_on(ray_cluster, shards, pairs, written, preset, least, tmp_path):
    out = str(tmp_path / "sweep")
    before = killed_after_one_trial(out, preset, "--data", pairs, "--init", written, "--trials", "4")
    recorded = sweep.trials_of(out)
    moved = tmp_path / "else" / "where it?is"
    moved.parent.mkdir()
    Path(out).rename(moved)
    out = str(moved)
    given = least(*SPACE, "sweep.trials=4", "sweep.final_seeds=2")

    def run_sweep(experiment, resume=False):
        return sweep.run(sweep.plan("dpo", pairs, written, out, experiment), resume)

    with pytest.raises(UserError, match=f"with {len(recorded)} trials; --resume goes on"):
        run_sweep(given)
    with pytest.raises(UserError, match="another configuration"):
        run_sweep(least(*SPACE, "dpo.epochs=3"), resume=True)
    found = run_sweep(given, resume=True)
    assert (moved / JOURNAL).read_bytes().startswith(before)
    trials = sweep.trials_of(out)
    assert trials[: len(recorded)] == recorded
    assert len(trials) == found["trials"] == len({trial.id for trial in trials}) == 4

    empty = [trial for trial in trials if trial.point.params["preferences.margin"] == 1.5]
    assert empty and all(trial.status == "infeasible" and "leaves no pair" in trial.why for trial in empty)
    done = [trial for trial in trials if trial.status == "done"]
    assert done and all(len(trial.history) == 2 for trial in done)
    assert found["statuses"] == Counter(trial.status for trial in trials)
    best = found["best"]
    assert best["green"]["value"] == max(trial.metrics["green"] for trial in done)
    assert all(point["green"] and point["kl"] for point in found["front"])

    # the reference was computed once, for all pairs that any trial could use: every part has its numbers
    (whole,) = moved.glob("pairs/margin0-*/reference/*.parquet")
    parts = [path for path in moved.glob("pairs/*/reference/*.parquet") if path != whole]
    known = {(row["chosen"], row["rejected"]) for row in pq.read_table(whole).to_pylist()}
    assert parts and {path.name for path in parts} == {whole.name}
    assert all((row["chosen"], row["rejected"]) in known for path in parts for row in pq.read_table(path).to_pylist())
    # nothing is kept of the trials but their reports; of the final ones their checkpoints
    assert {path.name for path in moved.glob("trials/*/*")} == {"reports.parquet"}
    assert len(list(moved.glob("final/trials/*/checkpoint/*.safetensors"))) == 4
    assert found["final"]["seeds"] == [100, 101]
    assert len(found["final"]["by_seed"]["winner"]["green"]) == 2

    table = pq.read_table(found["leaderboard"]).to_pylist()
    assert [row["trial"] for row in table] == [trial.id for trial in trials]
    assert [row["green"] for row in table] == [trial.metrics.get("green") for trial in trials]
    assert "Winner and default" in Path(found["page"]).read_text()
    assert json.loads((moved / "results.json").read_text()) == json.loads(json.dumps(found))
    counts = [(moved / JOURNAL).read_bytes().count(word) for word in (b'"point"', b'"record"')]
    assert run_sweep(given, resume=True) == found
    assert [(moved / JOURNAL).read_bytes().count(word) for word in (b'"point"', b'"record"')] == counts


@pytest.mark.slow
def test_a_trial_on_train_workers_measures_the_same_as_one_in_its_own_process(
    ray_cluster, shards, vision, least, tmp_path
):
    fields = ("green", "green_low", "green_high", "finding_f1", "n", "step", "visual_tokens")
    point = Point(params={"model.tokenizer.top_k": 4, "model.tokenizer.queries": 2}, seed=3)
    given = least("sweep.workers_per_trial=1", "data.fraction=0.5")
    plan = sweep.plan("tokenizer", shards.uri, vision, str(tmp_path / "workers"), given)
    sweep.prepare_features(given, shards.uri, vision)
    study = Study(database(plan.out), "s", ["green"], Point(seed=0))
    (trial,) = run_trials(plan, study, [point], lambda *_: None)
    assert trial.status == "done", trial.why
    assert [entry["step"] for entry in trial.history] == [2, 3]
    assert trial.metrics["visual_tokens"] == 2

    here = sweep.plan("tokenizer", shards.uri, vision, str(tmp_path / "here"), least("data.fraction=0.5"))
    told = []
    run(here, point, told.append)
    assert [{name: each[name] for name in fields} for each in told] == [
        {name: each[name] for name in fields} for each in trial.history
    ]
    assert plan.reports(point) == here.reports(point)


def test_a_sweep_that_cannot_work_is_refused_before_it_starts(ray_cluster, shards, vision, written, least, tmp_path):
    calls = {
        "lower --workers-per-trial": (vision, least("sweep.workers_per_trial=999")),
        "starts from a contrastive": (written, least()),
        "it is for mu2llm sweep dpo": (vision, least("sweep.objective=[kl]")),
        "name the preset": (vision, least("data.spec.grid=[8,16,32]")),
    }
    for says, (init, given) in calls.items():
        with pytest.raises(UserError, match=says):
            sweep.run(sweep.plan("tokenizer", shards.uri, init, str(tmp_path / "none"), given))
    assert not (tmp_path / "none").exists()


def test_a_fraction_of_the_patients_is_whole_patients_and_grows(shards):
    few, more = (shards.subset("train", fraction, seed=1) for fraction in (0.34, 0.67))
    assert set(few) < set(more) < {case.id for case in shards.cases("train")}
    patients = {case.id: case.patient for case in shards.cases("train")}
    chosen = {patients[name] for name in few}
    assert sorted(few) == sorted(name for name, patient in patients.items() if patient in chosen)
    assert shards.subset("train", 0.34, seed=2) != few

"""What trials say: repetitions, ranks, the Pareto front, the table and the command."""

import itertools
import shlex

import pyarrow.parquet as pq
import pytest

from mu2llm import config
from mu2llm.stages.job import Watch
from mu2llm.sweeps import results
from mu2llm.sweeps.sweep import command
from mu2llm.sweeps.trial import Plan, Point, Trial


def trial(number, top_k=8, seed=0, status="done", **metrics):
    point = Point(params={"model.tokenizer.top_k": top_k}, seed=seed)
    return Trial(id=f"t{number}", number=number, point=point, status=status, metrics=metrics)


def test_repetitions_are_one_row_with_an_interval_over_seeds():
    rows = results.ranked([trial(0, green=0.2), trial(1, seed=1, green=0.4), trial(2, top_k=4, green=0.25)], ["green"])
    assert [len(row.trials) for row in rows] == [2, 1]
    estimate = rows[0].estimate("green")
    assert estimate.value == pytest.approx(0.3)
    assert estimate.n == 2
    assert estimate.high - estimate.value == pytest.approx(12.706 * 0.1, rel=1e-3)  # t of one degree of freedom


def test_one_trial_has_its_interval_over_patients():
    (row,) = results.ranked([trial(0, green=0.2, green_low=0.1, green_high=0.3, n=40.0)], ["green"])
    assert row.estimate("green").model_dump() == {"value": 0.2, "low": 0.1, "high": 0.3, "n": 40}


def test_a_stopped_trial_never_wins_over_a_finished_one():
    rows = results.ranked([trial(0, 4, status="stopped", green=0.9), trial(1, 8, green=0.2)], ["green"])
    assert results.winner(rows, ["green"]).trials[0].id == "t1"
    assert [row.status for row in rows] == ["done", "stopped"]


def test_what_gave_nothing_is_last_and_wins_nothing():
    rows = results.ranked([trial(0, 4, status="failed"), trial(1, 8, status="infeasible")], ["green"])
    assert results.winner(rows, ["green"]) is None
    assert results.front(rows, ["green"]) == []


def test_among_equals_by_the_first_objective_the_one_that_is_beaten_in_no_other_wins():
    rows = results.ranked([trial(0, 4, green=0.5, kl=0.3), trial(1, 8, green=0.5, kl=0.1)], ["green", "kl"])
    assert results.winner(rows, ["green", "kl"]).trials[0].id == "t1"


def test_the_front_is_beaten_in_no_objective():
    told = [(4, 0.5, 8), (8, 0.6, 16), (16, 0.55, 16), (32, 0.4, 4), (64, 0.4, 8)]
    trials = [trial(i, k, finding_f1=f1, visual_tokens=tokens) for i, (k, f1, tokens) in enumerate(told)]
    rows = results.ranked(trials, ["finding_f1", "visual_tokens"])
    best = {row.params["model.tokenizer.top_k"] for row in results.front(rows, ["finding_f1", "visual_tokens"])}
    assert best == {4, 8, 32}


def test_the_table_keeps_every_trial(tmp_path):
    trials = [trial(0, green=0.2), trial(1, 4, status="failed").model_copy(update={"why": "a bug"})]
    rows = pq.read_table(results.write_leaderboard(str(tmp_path), trials)).to_pylist()
    assert [(row["status"], row["why"], row["seed"]) for row in rows] == [("done", "", 0), ("failed", "a bug", 0)]
    assert rows[0]["model.tokenizer.top_k"] == "8"
    assert rows[1]["green"] is None


def test_the_command_trains_the_winner_again():
    swept = config.load("tiny", ["sft.epochs=7", "sweep.trials=3", "sft.cpus_per_worker=1"])
    values = {"experiment": swept.model_dump(mode="json"), "shards": "D", "checksum": "0", "watch": Watch()}
    plan = Plan(kind="tokenizer", stage="sft", data="my data", init="C", out="O", **values)
    words = shlex.split(command(plan, {"model.tokenizer.scales": [1, 4]}))
    assert words[:7] == ["mu2llm", "train", "sft", "--data", "my data", "--init", "C"]
    assert words[words.index("--preset") + 1] == "tiny"
    sets = [word for before, word in itertools.pairwise(words) if before == "--set"]
    again = config.load("tiny", sets)
    assert again.model.tokenizer.scales == (1, 4)
    assert again.sft == swept.sft
    assert not any(word.startswith("sweep.") for word in sets)


def test_the_command_of_a_dpo_winner_names_its_own_pairs():
    values = {"experiment": config.load("tiny").model_dump(mode="json"), "shards": "D", "checksum": "0"}
    plan = Plan(kind="dpo", stage="dpo", data="P", init="C", out="/O", watch=Watch(), **values)
    words = shlex.split(command(plan, {"dpo.beta": 0.3, "preferences.margin": 0.2, "preferences.pairs_per_case": 2}))
    assert words[words.index("--data") + 1] == "/O/pairs/margin0.2-most2"
    assert [word for before, word in itertools.pairwise(words) if before == "--set"] == ["dpo.beta=0.3"]

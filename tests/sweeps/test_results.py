"""What trials say: repetitions, ranks, the Pareto front, importance, the table and the command."""

import pytest

from mu2llm import config
from mu2llm.sweeps import results
from mu2llm.sweeps.space import Space
from mu2llm.sweeps.trial import Point, Trial


def trial(number, top_k=8, seed=0, status="done", **metrics):
    point = Point(params={"model.tokenizer.top_k": top_k}, seed=seed, data="shards", init="contrastive")
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


def test_the_front_is_beaten_in_no_objective():
    told = [(4, 0.5, 8), (8, 0.6, 16), (16, 0.55, 16), (32, 0.4, 4), (64, 0.4, 8)]
    trials = [trial(i, k, finding_f1=f1, visual_tokens=tokens) for i, (k, f1, tokens) in enumerate(told)]
    rows = results.ranked(trials, ["finding_f1", "visual_tokens"])
    best = {row.params["model.tokenizer.top_k"] for row in results.front(rows, ["finding_f1", "visual_tokens"])}
    assert best == {4, 8, 32}


def test_importance_finds_the_key_that_matters():
    given = config.load("tiny")
    space = Space({key: Space.load("tokenizer", given).domains[key] for key in KEYS})
    trials = []
    for i in range(24):
        params = dict(zip(KEYS, ([8, 16, 32, 64][i % 4], [8, 16, 24][i % 3]), strict=True))
        point = Point(params=params, seed=0, data="", init="")
        trials.append(Trial(id=str(i), number=i, point=point, status="done", metrics={"green": i % 4 / 4}))
    shares = results.importance(trials, space, "green")
    assert shares["model.tokenizer.top_k"] > 0.9
    assert results.importance(trials[:3], space, "green") == {}


KEYS = ("model.tokenizer.top_k", "model.tokenizer.queries")


def test_the_table_keeps_every_trial(tmp_path):
    uri = results.write_parquet(str(tmp_path), [trial(0, green=0.2), trial(1, 4, status="failed")])
    import pyarrow.parquet as pq

    rows = pq.read_table(uri).to_pylist()
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert rows[0]["model.tokenizer.top_k"] == "8"
    assert rows[1]["green"] is None


def test_the_command_names_what_differs_from_the_preset():
    base = config.load("tiny")
    swept = config.load("tiny", ["sft.epochs=7", "sweep.trials=3"])
    told = results.command("sft", {"data": "D", "init": "C"}, {"model.tokenizer.scales": [1, 4]}, swept, base)
    assert "--preset tiny" in told
    assert "--set sft.epochs=7.0" in told
    assert "--set 'model.tokenizer.scales=[1, 4]'" in told
    assert "sweep" not in told
    again = config.load("tiny", ["sft.epochs=7.0", "model.tokenizer.scales=[1, 4]"])
    assert again.model.tokenizer.scales == (1, 4)

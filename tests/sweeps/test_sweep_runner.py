"""Proposals and concurrency, without a trial being trained."""

import pytest
import ray

from mu2llm import config
from mu2llm.errors import UserError
from mu2llm.sweeps import runner
from mu2llm.sweeps.space import Space
from mu2llm.sweeps.trial import Point, Trial

START = Point(params={}, seed=5, data="shards", init="contrastive")
ONE_KEY = [
    *(f"sweep.space.model.tokenizer.{key}=null" for key in ("scales", "queries", "attention", "num_layers")),
    "sweep.space.model.tokenizer.temperature=null",
    "sweep.space.model.tokenizer.top_k={choice: [4, 8, 16]}",
]


def proposals(out, before=(), *overrides, points=None):
    given = config.load("tiny", [*ONE_KEY, *overrides])
    space = Space.load("tokenizer", given)
    database = runner.database(str(out), given.sweep)
    first = space.known_good(given) if points is None else points
    return runner._Proposals(space, START, given.sweep, database, before, first, "sft-a")


def record(top_k, green, number=0, seed=5):
    point = START.model_copy(update={"params": {"model.tokenizer.top_k": top_k}, "seed": seed})
    metrics = {} if green is None else {"green": green}
    return Trial(
        id=f"t{number}", number=number, point=point, status="failed" if green is None else "done", metrics=metrics
    )


def test_known_good_points_come_first(tmp_path):
    search = proposals(tmp_path, (), "sweep.first=[{model.tokenizer.top_k: 16}]")
    proposed = [search.suggest(f"trial-{i}")["point"]["params"]["model.tokenizer.top_k"] for i in range(2)]
    assert proposed == [8, 16]


def test_the_same_proposal_again_is_the_next_seed(tmp_path):
    search = proposals(tmp_path, (), points=[])
    seeds = {}
    for i in range(12):
        point = search.suggest(f"trial-{i}")["point"]
        seeds.setdefault(point["params"]["model.tokenizer.top_k"], []).append(point["seed"])
    assert all(given == list(range(5, 5 + len(given))) for given in seeds.values())
    assert max(map(len, seeds.values())) > 1


def test_an_interrupted_proposal_is_made_again_and_a_recorded_one_is_not(tmp_path):
    search = proposals(tmp_path, points=[{"model.tokenizer.top_k": top_k} for top_k in (8, 16)])
    first, second = (search.suggest(f"trial-{i}")["point"] for i in range(2))
    search.on_trial_complete("trial-0", {"green": 0.3})
    ended = record(first["params"]["model.tokenizer.top_k"], 0.3)
    again = proposals(tmp_path, [ended])
    point = again.suggest("trial-2")["point"]
    assert point["params"] == second["params"]
    assert len(again._ot_study.trials) == 3  # the finished one is not told twice


def test_a_proposal_that_was_only_half_made_is_let_go(tmp_path):
    two = "sweep.space.model.tokenizer.queries={choice: [2, 4]}"
    first = proposals(tmp_path, (), two, points=[])
    key, distribution = next(iter(first.space.distributions().items()))
    first._ot_study.ask().suggest_categorical(key, distribution.choices)  # as a kill leaves it: one value of two
    sound = {"model.tokenizer.top_k": 16, "model.tokenizer.queries": 2}
    again = proposals(tmp_path, (), two, points=[sound])
    assert again.suggest("trial-0")["point"]["params"] == sound


def test_a_study_that_is_gone_is_made_anew_from_the_records(tmp_path):
    before = [record(4, 0.1), record(8, 0.4, 1), record(16, None, 2)]
    study = proposals(tmp_path, before)._ot_study
    assert [trial.value for trial in study.trials] == [0.1, 0.4, None]
    assert study.best_trial.params == {"model.tokenizer.top_k": "8"}


def test_what_cannot_be_trained_ranks_last_in_the_search(tmp_path):
    search = proposals(tmp_path)
    search.suggest("trial-0")
    search.on_trial_result("trial-0", {"status": "infeasible", "why": "out of memory"})
    search.on_trial_complete("trial-0", {"status": "infeasible", "why": "out of memory"})
    assert search._ot_study.trials[0].state.name == "PRUNED"


def test_a_grid_is_every_combination_once(tmp_path):
    given = config.load("tiny", ONE_KEY)
    space = Space.load("tokenizer", given)
    search = proposals(tmp_path, (), "sweep.search=grid", points=space.grid())
    proposed = [search.suggest(f"trial-{i}")["point"]["params"]["model.tokenizer.top_k"] for i in range(3)]
    assert sorted(proposed) == [4, 8, 16]


def test_a_database_that_is_none_is_a_mistake():
    with pytest.raises(UserError, match=r"sweep\.storage"):
        runner.database("s3://bucket/out", config.load("tiny", ["sweep.storage=nonsense://here"]).sweep)


def nodes(monkeypatch, *resources):
    found = [{"Alive": True, "Resources": each} for each in resources]
    monkeypatch.setattr(ray, "nodes", lambda: found)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "expected"),
    [(1, 1, 0, 12), (0, 2, 0, 6), (2, 3, 0, 1), (1, 1, 0.25, 8), (2, 1, 2, 1)],
)
def test_as_many_trials_as_their_workers_fit_the_nodes(monkeypatch, workers, cpus, gpus, expected):
    nodes(monkeypatch, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0})
    given = config.load(
        "tiny",
        [f"sweep.workers_per_trial={workers}", f"sweep.gpus_per_trial={gpus}", f"sft.cpus_per_worker={cpus}"],
    )
    assert runner.concurrency(given.sft, given.sweep) == expected


def test_a_worker_that_fits_no_node_is_refused_though_the_cluster_has_as_much(monkeypatch):
    nodes(monkeypatch, {"CPU": 4.0}, {"CPU": 4.0})
    given = config.load("tiny", ["sft.cpus_per_worker=6", "sweep.workers_per_trial=1"])
    with pytest.raises(UserError, match="lower --workers-per-trial"):
        runner.concurrency(given.sft, given.sweep)


def test_trials_that_would_shard_their_model_are_refused_before_the_first():
    given = config.load("tiny", ["dpo.fsdp=full_shard"])
    with pytest.raises(UserError, match="sweep with it unset"):
        runner.concurrency(given.dpo, given.sweep)


def test_asha_ends_no_trial_at_its_last_measurement():
    plan = runner.Plan(stage="sft", experiment={}, out="", watch=runner_watch(4), identity="")
    scheduler = runner._scheduler(plan, config.load("tiny", ["sweep.objective=[visual_tokens,green]"]).sweep)
    assert scheduler._metric == "green"
    assert max(rung for bracket in scheduler._brackets for rung, _ in bracket._rungs) < 4
    assert not isinstance(runner._scheduler(plan, config.load("tiny", ["sweep.scheduler=none"]).sweep), type(scheduler))


def runner_watch(times):
    from mu2llm.stages.job import Watch

    return Watch(times=times)

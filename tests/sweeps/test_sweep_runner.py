"""What Ray Tune is asked for and what it tells, without a trial being trained."""

from types import SimpleNamespace

import pytest
import ray

from mu2llm import config, private_apis
from mu2llm.errors import UserError
from mu2llm.stages.job import Watch
from mu2llm.stages.placement import UNKNOWN
from mu2llm.sweeps import runner
from mu2llm.sweeps.space import Domain, Space
from mu2llm.sweeps.study import Study, database
from mu2llm.sweeps.trial import Plan, Point

SPACE = Space({"model.tokenizer.top_k": Domain(choice=(4, 8, 16))})


def nodes(monkeypatch, *resources, grows_to=None, scales_itself=False):
    """The cluster has nodes of such resources; it scales itself to (count, resources) of others where that is given."""
    monkeypatch.setattr(private_apis, "scales_itself", lambda: scales_itself)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": each} for each in resources])
    count, each = grows_to or (0, {})
    limits = SimpleNamespace(node_group_configs=[SimpleNamespace(resources=each, max_count=count)], max_resources={})
    monkeypatch.setattr(private_apis, "cluster_limits", lambda: limits if grows_to else None)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "expected"),
    [(0, 4, 0, 3), (1, 4, 0, 3), (2, 2, 0, 3), (3, 4, 0, 1), (1, 1, 0.5, 4), (1, 1, 1, 2), (4, 1, 2, 1)],
)
def test_as_many_trials_as_their_workers_fit_the_nodes(monkeypatch, workers, cpus, gpus, expected):
    nodes(monkeypatch, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0})
    sets = [f"sweep.workers_per_trial={workers}", f"sweep.gpus_per_trial={gpus}", f"sft.cpus_per_worker={cpus}"]
    given = config.load("tiny", [*sets, "sweep.max_concurrent=null"])
    assert runner.concurrency(given.sft, given.sweep) == expected
    capped = config.load("tiny", [*sets, "sweep.max_concurrent=2"])
    assert runner.concurrency(capped.sft, capped.sweep) == min(expected, 2)


def test_trials_fill_the_nodes_that_the_autoscaler_may_add(monkeypatch):
    nodes(monkeypatch, {"memory": 2e9}, grows_to=(6, {"CPU": 8.0}))
    given = config.load("tiny", ["sft.cpus_per_worker=4", "sweep.workers_per_trial=2", "sweep.max_concurrent=null"])
    assert runner.concurrency(given.sft, given.sweep) == 6


@pytest.mark.parametrize(("workers", "most", "expected"), [(0, "null", UNKNOWN), (0, 5, 5), (2, "null", 1), (2, 5, 5)])
def test_trials_of_a_cluster_that_grows_to_what_it_does_not_tell(monkeypatch, workers, most, expected):
    nodes(monkeypatch, {"memory": 2e9}, scales_itself=True)
    given = config.load("tiny", [f"sweep.workers_per_trial={workers}", f"sweep.max_concurrent={most}"])
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


def test_asha_goes_by_the_first_objective_that_training_improves():
    scheduler = runner.scheduler(
        config.load("tiny", ["sweep.objective=[visual_tokens,green]", "sweep.reports=4"]).sweep
    )
    assert scheduler.metric == "green"
    for sets in (["sweep.scheduler=none"], ["sweep.objective=[visual_tokens]"], ["sweep.reports=1"]):
        assert not isinstance(runner.scheduler(config.load("tiny", sets).sweep), type(scheduler))


def told(scheduler, trial, values):
    """What ASHA says to a trial's measurements, one after another."""
    return [
        scheduler.on_trial_result(None, trial, {"training_iteration": i, "green": value})
        for i, value in enumerate(values, 1)
    ]


def test_asha_stops_what_falls_behind_and_ends_no_trial_at_its_last_measurement():
    sweep = config.load("tiny", ["sweep.objective=[green]", "sweep.reports=4", "sweep.reduction=2"]).sweep
    scheduler = runner.scheduler(sweep)
    trials = [SimpleNamespace(trial_id=str(i)) for i in range(6)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    good = [told(scheduler, trial, [0.5 + i / 100, 0.6 + i / 100]) for i, trial in enumerate(trials[:4])]
    assert all(decisions[0] == "CONTINUE" for decisions in good)
    assert told(scheduler, trials[4], [0.1]) == ["STOP"]
    assert "STOP" not in told(scheduler, trials[5], [0.9, 0.9])  # 3 is max_t: the fourth measurement ends a trial


@pytest.fixture
def recorder(tmp_path):
    plan = Plan(
        **{"kind": "tokenizer", "stage": "sft", "experiment": config.load("tiny").model_dump(mode="json")},
        **{"data": "D", "init": "C", "shards": "D", "checksum": "0", "out": str(tmp_path), "watch": Watch(times=2)},
    )
    return Recorder(plan, Study(database(str(tmp_path)), "s", ["green"], Point(seed=0), SPACE))


class Recorder:
    """Stands where Tune stands."""

    def __init__(self, plan, study):
        self.plan, self.study, self.shown = plan, study, []

    def trial(self, *results, to_the_end=False, error=None):
        recorder = runner._Recorder(self.plan, self.study, to_the_end, lambda *shown: self.shown.append(shown))
        key = str(len(self.study.study.trials))
        told = runner._Proposals(self.study).suggest(key)
        trial = SimpleNamespace(trial_id=key, config=told, last_result={}, get_pickled_error=lambda: None)
        trial.get_error = lambda: error
        recorder.on_trial_start(0, [], trial)
        for result in results:
            trial.last_result = result
            recorder.on_trial_result(0, [], trial, result)
        (recorder.on_trial_error if error else recorder.on_trial_complete)(0, [], trial)
        return next(iter(self.study.trials()[-1:]), None)


def test_a_trial_that_came_to_its_end_is_told_from_one_that_was_stopped(recorder):
    first, last = {"green": 0.1, "step": 3.0, "ended": False}, {"green": 0.2, "step": 6.0, "ended": True}
    done = recorder.trial(first, {**last, "training_iteration": 2, "pid": 7})
    assert (done.status, done.metrics) == ("done", {"green": 0.2, "step": 6.0})
    assert [entry["step"] for entry in done.history] == [3.0, 6.0]
    assert recorder.trial(last).status == "done"  # fewer steps than measurements
    assert recorder.trial(first).status == "stopped"
    assert [old.value for old in recorder.study.study.trials] == [0.2, 0.2, 0.1]
    assert [number for number, _ in recorder.shown] == [1, 1, 1]


def test_a_training_that_time_ended_is_no_result_where_all_must_come_to_their_end(recorder):
    assert recorder.trial({"green": 0.1, "ended": False}, to_the_end=True) is None
    assert recorder.study.study.trials[0].state.name == "FAIL"


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("ray.exceptions.OutOfMemoryError: killed"), "infeasible"), (ValueError("a bug\nof two"), "failed")],
)
def test_a_trial_whose_process_died_is_recorded_with_the_reason(recorder, error, status):
    died = recorder.trial({"green": 0.1, "step": 3.0, "ended": False}, error=error)
    assert died.status == status
    assert died.why.startswith(type(error).__name__) and "\n" not in died.why
    assert died.value("green") is None


def test_what_a_trial_said_went_wrong_is_recorded(recorder):
    refused = recorder.trial({"status": "infeasible", "why": "3 heads do not divide 32"})
    assert (refused.status, refused.why, refused.history) == ("infeasible", "3 heads do not divide 32", [])

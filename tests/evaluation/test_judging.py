"""Judging on Ray: the same judgements as in one process, by actors that hold what they declare."""

import gc
import time

import pytest
import ray
from tiny_judge import save

from mu2llm import green
from mu2llm.errors import UserError
from mu2llm.evaluation import judging
from mu2llm.settings.green import JudgeConfig

PAIRS = [("No effusion.", f"Left nodule of {n} mm in the lung.") for n in range(7)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    prompt = folder / "prompt.txt"
    prompt.write_text("{reference} : {candidate}")
    model = save(folder / "model")
    return JudgeConfig(name=f"hf:{model}", batch_size=2, max_new_tokens=6, prompt=str(prompt), actors=1)


def test_actors_answer_as_this_process_does(ray_cluster, config):
    judge = judging.load_judge(config)
    pairs = [*PAIRS, ("", "x"), PAIRS[0]]
    assert judge.judge(pairs) == green.load_judge(config).judge(pairs)


def test_the_model_is_not_loaded_here_and_actors_hold_what_they_declare(ray_cluster, config, monkeypatch):
    """The driver loaded it, on whatever GPU it saw, while actors believed that they owned that."""
    from mu2llm.green.local import LocalWriter

    monkeypatch.setattr(LocalWriter, "__init__", lambda *_: pytest.fail("loaded by the driver"))
    gc.collect()  # actors of earlier tests are on their way out, some of them held by cycles
    free = at_rest()
    writer = judging.ActorWriter(config.name.removeprefix("hf:"), config.model_copy(update={"cpus_per_actor": 3}))
    answers = writer.answers(["no effusion", "left nodule", "in the lung"])
    next(answers)
    held = free - ray.available_resources().get("CPU", 0)
    assert len(list(answers)) == 2
    assert held == 3


def at_rest(seconds=2.0):
    """The CPUs that are free, once that has not changed for a while."""
    free, since = ray.available_resources().get("CPU", 0), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.05)
        if (now := ray.available_resources().get("CPU", 0)) != free:
            free, since = now, time.monotonic()
    return free


def test_a_model_that_is_not_there_is_said_before_any_actor_starts(ray_cluster, tmp_path):
    with pytest.raises(UserError, match="judge hf:"):
        judging.load_judge(JudgeConfig(name=f"hf:{tmp_path}/gone"))


def test_gpus_are_those_declared_else_one_where_there_are_any(monkeypatch):
    monkeypatch.setattr(judging.private_apis, "largest_resources", dict)
    for resources, declared, gpus in (({}, None, 0), ({"GPU": 8}, None, 1), ({"GPU": 8}, 0.5, 0.5), ({"GPU": 8}, 0, 0)):
        monkeypatch.setattr(judging.ray, "cluster_resources", lambda found=resources: found)
        assert judging._gpus(JudgeConfig(gpus_per_actor=declared)) == gpus


def test_many_pairs_are_judged_by_rules_in_tasks(ray_cluster, monkeypatch):
    rules = green.load_judge(JudgeConfig())
    judge = judging.load_judge(JudgeConfig())
    assert judge.judge(PAIRS) == rules.judge(PAIRS) and judge.identity == rules.identity
    monkeypatch.setattr(judging, "MANY", 2)
    monkeypatch.setattr(judging, "PAIRS_A_TASK", 3)
    monkeypatch.setattr(judge._rules, "judge", lambda pairs: pytest.fail("judged here"))
    assert judge.judge(PAIRS) == rules.judge(PAIRS)


def test_what_is_judged_ahead_is_asked_once():
    asked = []

    class Counting:
        identity, measures = "counting", "other"

        def judge(self, pairs):
            asked.append(list(pairs))
            return [str(pair) for pair in pairs]

    judge = judging.Ahead(Counting(), [("a", "b"), ("a", "c"), ("a", "b")])
    assert judge.judge([("a", "c"), ("a", "b")]) == ["('a', 'c')", "('a', 'b')"]
    assert judge.judge([("a", "b"), ("x", "y")])[1] == "('x', 'y')"
    assert asked == [[("a", "b"), ("a", "c")], [("x", "y")]] and judge.measures == "other"

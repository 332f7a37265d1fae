"""Winner and default on recorded reports: what is compared, what decides, and what is trained for it."""

import pytest

from mu2llm import storage
from mu2llm.errors import Failure
from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.green import load_judge
from mu2llm.stages.job import Watch
from mu2llm.stages.validation import write_reports
from mu2llm.sweeps import final as finals
from mu2llm.sweeps.study import Study, database
from mu2llm.sweeps.trial import Plan, Point, Trial

RIGHT, WRONG = "Findings: There is a large left pleural effusion.", "Findings: No pleural effusion."


@pytest.fixture
def cases(shards):
    """Four cases of two patients, of which the middle two have an effusion."""
    return shards.cases("test")


def test_both_sides_are_compared_over_their_seeds_on_the_same_patients(cases, least):
    references = [case.report for case in cases]
    judge, bootstrap = load_judge(least().judge), Bootstrap([case.patient for case in cases], 200, 0)
    half = [*references[:2], *(["The liver is normal."] * 2)]
    compared = finals.compare(cases, [references, half], [half, half], judge, bootstrap)
    f1 = {side: compared[side]["finding_f1"].value for side in compared}
    # effusions in the cases 1 and 2: found in both by the first seed, in one of them by the others
    assert f1["winner"] == pytest.approx(2 * 3 / (2 * 3 + 1))
    assert f1["default"] == pytest.approx(2 * 2 / (2 * 2 + 2))
    assert f1["difference"] == pytest.approx(f1["winner"] - f1["default"])
    same = finals.compare(cases, [half], [half], judge, bootstrap)
    assert {(e.value, e.low, e.high) for e in same["difference"].values()} == {(0.0, 0.0, 0.0)}


class Trained:
    """`run_trials` as it would have been: what each side writes, and how it ended."""

    def __init__(self, cases, writes, status="done"):
        self.cases, self.writes, self.status, self.points = cases, writes, status, []

    def __call__(self, plan, study, points, progress):
        self.points += points
        for point in points:
            texts = [_Text(text) for text in self.writes[point.name](point.seed)]
            for split in (plan.watch.split, plan.watch.then):
                write_reports(plan.watched(point).table(split), self.cases, texts, "?")
        numbers = {"green": 0.5, "finding_f1": 0.5}
        return [Trial(id=plan.id_of(p), point=p, status=self.status, why="why not", metrics=numbers) for p in points]


class _Text:
    def __init__(self, text):
        self.text, self.tokens, self.finished = text, 3, True


@pytest.fixture
def plan(least, shards, tmp_path):
    values = least("sweep.final_seeds=2", "sweep.objective=[visual_tokens,finding_f1]").model_dump(mode="json")
    where = {"data": shards.uri, "init": "C", "shards": shards.uri, "out": str(tmp_path), "checksum": "0"}
    return Plan(kind="tokenizer", stage="sft", experiment=values, watch=Watch(), **where)


def compared(plan, trained, monkeypatch):
    evaluated = []
    monkeypatch.setattr(finals, "run_trials", trained)
    monkeypatch.setattr(finals, "evaluate", lambda *given: evaluated.append(given))
    study = Study(database(plan.out), "final", ["finding_f1"], Point(seed=0))
    return finals.final(plan, study, {"sft.epochs": 3}, lambda *_: None), evaluated


def test_a_winner_that_is_better_is_evaluated_in_full(plan, cases, monkeypatch):
    references = [case.report for case in cases]
    trained = Trained(cases, {"winner": lambda seed: references, "default": lambda seed: ["Nothing."] * 4})
    found, evaluated = compared(plan, trained, monkeypatch)
    assert found.better and found.decided_by == "finding_f1"
    assert "the winner is better than the default: Findings F1 +1" in found.said
    assert [(p.name, p.seed, p.params, p.keep) for p in trained.points[:2]] == [
        ("winner", 100, {"sft.epochs": 3}, True),
        ("default", 100, {}, True),
    ]
    assert len(trained.points) == 4 and found.seeds == [100, 101]
    ((checkpoint, _, out, _, split),) = evaluated
    assert checkpoint == found.checkpoints[0] and split == "test"
    assert out == found.evaluation == storage.join(plan.out, "final", "evaluation")
    assert found.by_seed["winner"]["green"] == [0.5, 0.5]


def test_a_winner_that_was_lucky_is_not_evaluated(plan, cases, monkeypatch):
    references = [case.report for case in cases]
    lucky = {"winner": lambda seed: references if seed == 100 else ["Nothing."] * 4}
    steady = {"default": lambda seed: references if seed == 101 else ["Nothing."] * 4}
    found, evaluated = compared(plan, Trained(cases, lucky | steady), monkeypatch)
    assert not found.better and not evaluated and found.evaluation is None
    assert "is not better" in found.said and found.said.endswith("keep the default")


def test_validation_decides_and_the_test_split_only_reports(plan, cases, shards, monkeypatch):
    references = [case.report for case in cases]
    trained = Trained(cases, {"winner": lambda seed: references, "default": lambda seed: ["Nothing."] * 4})
    real, asked = finals.compare, []

    def compare(cases, *given):
        asked.append({case.split for case in cases})
        found = real(cases, *given)
        return found if asked[-1] == {"validation"} else {**found, "difference": dict.fromkeys(found["difference"])}

    monkeypatch.setattr(finals, "compare", compare)
    found, evaluated = compared(plan, trained, monkeypatch)
    assert asked == [{"validation"}, {"test"}] and found.split == "test" and found.decided_on == "validation"
    assert found.better and evaluated  # whatever test says
    assert found.decision["finding_f1"].low > 0 and "on validation, – on test" in found.said


def test_a_side_that_could_not_be_trained_is_named(plan, cases, monkeypatch):
    trained = Trained(cases, {"winner": lambda seed: ["x"] * 4, "default": lambda seed: ["x"] * 4}, "failed")
    with pytest.raises(Failure, match="the winner with seed 100 did not come to its end: why not"):
        compared(plan, trained, monkeypatch)


def test_trainings_that_time_ended_are_counted(plan, monkeypatch):
    with pytest.raises(Failure, match="4 final trials were not run in time; --resume"):
        compared(plan, lambda *_: [], monkeypatch)

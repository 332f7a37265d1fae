"""The study: what is proposed, what is recorded, and what a kill at any moment leaves. Nothing is trained here."""

import ast
import json
from importlib.resources import files

import optuna
import pytest

from mu2llm import config, storage
from mu2llm.errors import UserError
from mu2llm.sweeps.space import Domain, Space, canonical
from mu2llm.sweeps.study import JOURNAL, Journal, Study, database, importance, recorded
from mu2llm.sweeps.trial import Point, Trial

START = Point(seed=5)
SPACE = Space({"dpo.beta": Domain(log=(0.01, 1)), "model.tokenizer.scales": Domain(subsets=(1, 2))})
KEYS = list(SPACE.domains)


def settings(search="optuna"):
    return config.load("tiny", [f"sweep.search={search}"]).sweep


def opened(out, objective=("green",), space=SPACE, points=(), search="optuna"):
    study = Study(database(str(out)), "s", objective, START, space)
    study.go_on(settings(search), points)
    return study


def trial(point, status="done", **metrics):
    return Trial(id=canonical(point.model_dump()), point=point, status=status, metrics=metrics)


def train(study, key, **metrics):
    point = study.propose(key)
    study.record(key, trial(point, **(metrics or {"green": score(point)})))
    return point


def score(point):
    return point.params.get("dpo.beta", 0.5) / (1 + point.seed)


def points(*params):
    return [Point(params=dict(zip(KEYS, each, strict=True)), seed=5) for each in params]


def test_given_points_come_first_and_what_is_trained_can_be_typed(tmp_path):
    study = opened(tmp_path, points=points((0.1, [2]), (0.5, [1, 2])))
    proposed = [train(study, str(i)) for i in range(6)]
    assert proposed[:2] == points((0.1, [2]), (0.5, [1, 2]))
    betas = [point.params["dpo.beta"] for point in proposed]
    assert all(beta == float(f"{beta:.4g}") for beta in betas)
    assert {canonical(point.params) for point in proposed[2:]}.isdisjoint(canonical(p.params) for p in proposed[:2])


def test_the_same_proposal_again_is_the_next_seed(tmp_path):
    study = opened(tmp_path, space=Space({"model.tokenizer.top_k": Domain(choice=(4, 8))}))
    seeds: dict[str, list[int]] = {}
    for i in range(8):
        point = train(study, str(i))
        seeds.setdefault(canonical(point.params), []).append(point.seed)
    assert sorted(seed for each in seeds.values() for seed in each) == sorted(
        seed for each in seeds.values() for seed in range(5, 5 + len(each))
    )
    assert len(seeds) == 2


def test_a_search_that_goes_on_draws_on(tmp_path):
    """Its proposals are not those of its beginning once more."""
    drawn = [train(opened(tmp_path, search="random"), str(i)).params["dpo.beta"] for i in range(5)]
    assert len(set(drawn)) == 5


def journals_of(objective, given, search, status):
    """The journal of a whole search, after every write to it."""
    backend = Journal("memory://none")
    backend.lines, written = [], [b""]

    def append(logs):
        backend.lines += [json.dumps(log).encode() + b"\n" for log in logs]
        written.append(b"".join(backend.lines))

    backend.append_logs = append
    study = Study(optuna.storages.JournalStorage(backend), "s", objective, START, SPACE)
    study.go_on(settings(search), given)
    for turn in range(0, 4, 2):  # two at a time
        pair = {key: study.propose(key) for key in (f"a{turn}", f"b{turn}")}
        for key, point in pair.items():
            study.measured(key, {"green": 0.1, "step": 1.0})
            study.record(key, trial(point, status(point), green=score(point), kl=0.1))
    return written


@pytest.fixture
def no_reading_of_memory(monkeypatch):
    exists = storage.exists
    monkeypatch.setattr(storage, "exists", lambda uri: not uri.startswith("memory:") and exists(uri))


@pytest.mark.parametrize(("search", "objective"), [("optuna", ["green"]), ("grid", ["green", "kl"])])
def test_a_kill_at_any_moment_loses_no_trial_and_repeats_none(tmp_path, no_reading_of_memory, objective, search):
    """After every single write: what is recorded stays, what is not is proposed again, each point is trained once."""
    given = points((0.1, [2]), (0.5, [1, 2]), (0.3, [1]), (0.9, [2]))
    status = lambda point: "infeasible" if point.params["dpo.beta"] == 0.3 else "done"  # noqa: E731
    journals = journals_of(objective, given if search == "grid" else given[:1], search, status)
    assert len(journals) > 25
    for moment, journal in enumerate(journals):
        out = tmp_path / str(moment)
        out.mkdir()
        (out / JOURNAL).write_bytes(journal)
        study = opened(out, objective, points=given if search == "grid" else given[:1], search=search)
        before = study.trials()
        open_points = [p for p in proposed(journal) if p not in [t.point for t in before]]
        assert all(point in study.first for point in open_points)
        again = []
        for i in range(4 - len(before)):
            again.append(study.propose(str(i)))
            study.record(str(i), trial(again[-1], status(again[-1]), green=score(again[-1]), kl=0.1))
        assert study.trials()[: len(before)] == before
        every = [canonical(each.point.model_dump()) for each in study.trials()]
        assert len(every) == len(set(every)) == 4
        assert all(point in again for point in open_points[: len(again)])
        if search == "grid":
            assert set(every) == {canonical(point.model_dump()) for point in given}


def proposed(journal):
    """The points that a journal names."""
    logs = [json.loads(line) for line in journal.splitlines()]
    found = [log["user_attr"]["point"] for log in logs if "point" in log.get("user_attr", {})]
    return [Point.model_validate(point) for point in found]


def test_a_trial_that_was_recorded_but_not_told_is_not_trained_again(tmp_path):
    study = opened(tmp_path)
    point = study.propose("a")
    study.asked["a"].set_user_attr("record", trial(point, green=0.7).model_dump(exclude={"number"}))
    again = opened(tmp_path)
    assert [each.metrics for each in again.trials()] == [{"green": 0.7}]
    assert again.study.best_value == 0.7
    assert again.first == []


def test_what_cannot_be_trained_ranks_last_in_the_search_and_what_failed_teaches_it_nothing(tmp_path):
    study = opened(tmp_path)
    for status in ("infeasible", "failed", "stopped", "done"):
        study.record(status, trial(study.propose(status), status, **({"green": 0.1} if status[-1] != "d" else {})))
    assert [old.state.name for old in study.study.trials][:2] == ["PRUNED", "FAIL"]
    assert [each.status for each in study.trials()] == ["infeasible", "failed", "stopped", "done"]


def test_a_trial_without_one_of_several_objectives_has_failed(tmp_path):
    study = opened(tmp_path, ["green", "kl"])
    train(study, "a", green=0.3)
    train(study, "b", green=0.2, kl=float("nan"))
    train(study, "c", green=0.2, kl=0.1)
    assert [old.state.name for old in study.study.trials] == ["FAIL", "FAIL", "COMPLETE"]
    assert len(study.trials()) == 3
    assert opened(tmp_path, ["green", "kl"]).first == []


def test_given_points_are_trained_once_each_whatever_was_open_before(tmp_path):
    """The final trainings: of another winner's interrupted point nothing is asked again."""
    old, new = Point(seed=100, name="winner", params={"dpo.beta": 0.1}), Point(seed=100, name="default")
    study = opened(tmp_path, space=None, points=[old, new])
    assert study.propose("a") == old
    again = opened(tmp_path, space=None, points=[new])
    assert again.first == [new]
    assert train(again, "b", green=0.1) == new
    assert opened(tmp_path, space=None, points=[new]).first == []


def test_what_was_let_go_is_proposed_when_the_study_goes_on(tmp_path):
    study = opened(tmp_path)
    point = study.propose("a")
    study.let_go("a")
    assert study.trials() == []
    assert opened(tmp_path).first == [point]


def test_a_study_that_was_moved_or_put_into_a_bucket_goes_on(tmp_path):
    study = opened(tmp_path / "here")
    points = [train(study, str(i)) for i in range(3)]
    (tmp_path / "here").rename(tmp_path / "moved to a?b%20c")
    moved = opened(tmp_path / "moved to a?b%20c")
    assert [each.point for each in moved.trials()] == points
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    with storage.embedded_s3(tmp_path / "served"):
        storage.copy(str(tmp_path / "moved to a?b%20c"), "s3://bucket/sweep")
        uploaded = opened("s3://bucket/sweep")
        points.append(train(uploaded, "next"))
        assert [each.point for each in recorded(database("s3://bucket/sweep"), "s")] == points


def test_optunas_own_reader_takes_the_journal(tmp_path):
    """What the dashboard opens."""
    train(opened(tmp_path), "a", green=0.4)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / JOURNAL))
    study = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
    assert study.best_value == 0.4


def test_a_database_is_used_where_one_is_named(tmp_path):
    url = f"sqlite:///{tmp_path}/several.db"
    study = Study(database("s3://nowhere/out", url), "s", ["green"], START, SPACE)
    study.go_on(settings(), [])
    point = train(study, "a")
    assert [each.point for each in recorded(database("elsewhere", url), "s")] == [point]


def test_a_database_that_is_none_and_a_study_that_is_not_there_are_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"sweep\.storage"):
        database("out", "nonsense://here")
    with pytest.raises(UserError, match=r"give the sweep\.storage"):
        recorded(database(str(tmp_path)), "another")


def test_importance_finds_the_key_that_matters_in_either_direction(tmp_path):
    two = Space({"a": Domain(choice=(1, 2, 3, 4)), "b": Domain(choice=(1, 2, 3))})
    given = [Point(params={"a": 1 + i % 4, "b": 1 + i % 3}, seed=5 + i) for i in range(24)]
    study = opened(tmp_path, ["green", "kl"], two, given, "random")
    for i in range(24):
        if i == 3:
            assert importance(study, "green") == {}
        point = study.propose(str(i))
        study.record(str(i), trial(point, green=point.params["a"] / 4, kl=point.params["b"] / 3))
    assert importance(study, "green")["a"] > 0.9
    assert importance(study, "kl")["b"] > 0.9


def test_nothing_private_is_asked_of_optuna_and_ray():
    """No attribute that begins with an underscore is read of anything but of oneself."""
    for path in (files("mu2llm") / "sweeps").iterdir():
        if path.name.endswith(".py"):
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
            private = [node for node in nodes if node.attr.startswith("_") and not node.attr.startswith("__")]
            foreign = [n.attr for n in private if not (isinstance(n.value, ast.Name) and n.value.id == "self")]
            assert not foreign, f"{path.name}: {foreign}"

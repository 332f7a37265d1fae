"""The ablation on recorded reports: what is trained, its statistics, its table, its page. Nothing is trained here."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mu2llm import storage
from mu2llm.errors import Failure, UserError
from mu2llm.evaluation import text_metrics
from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.green import load_judge
from mu2llm.records import Checkpoint
from mu2llm.stages.texts import findings_of
from mu2llm.stages.validation import write_reports
from mu2llm.sweeps import ablation
from mu2llm.sweeps.ablation import DPO, PRIOR, VARIANTS
from mu2llm.sweeps.trial import Trial


class Letters:
    """BERTScore by a text's letters, counted; alike only if they are the same."""

    identity = "letters"

    def __init__(self, *_):
        pass

    def tokens(self, texts):
        return [np.eye(128)[[min(ord(letter), 127) for letter in f" {text} "]] for text in texts]

    def scores(self, pairs):
        return text_metrics.bert_score(pairs, self)


@pytest.fixture
def cases(shards):
    return shards.cases("test")


@pytest.fixture
def measured(cases, least):
    """Reports of four cases by (variant, fraction, seed) → cells by (variant, fraction)."""
    judge, bootstrap = load_judge(least().judge), Bootstrap([case.patient for case in cases], 300, 0)

    def measure(found, missing=None):
        cells = ablation.measure(cases, found, missing or {}, judge, Letters(), bootstrap)
        return {(cell.variant, cell.fraction): cell for cell in cells}

    return measure


def right(cases, n):
    """Reports of which the first n are the references."""
    return [case.report if i < n else "The heart is normal." for i, case in enumerate(cases)]


def test_a_variants_interval_and_its_gain_are_over_seeds_and_patients(cases, measured):
    ours, theirs = {0: 4, 1: 2, 2: 3}, {0: 2, 1: 2, 2: 1}
    found = {("all", 1.0, seed): right(cases, n) for seed, n in ours.items()}
    cells = measured(found | {("baseline", 1.0, seed): right(cases, n) for seed, n in theirs.items()})
    mine, base = cells["all", 1.0], cells["baseline", 1.0]
    green = mine.metrics["green"]
    by_seed = [measured({("all", 1.0, 0): right(cases, n)})["all", 1.0].metrics["green"].value for n in (4, 2, 3)]
    assert green.value == pytest.approx(np.mean(by_seed)) and green.n == len(cases) and mine.seeds == [0, 1, 2]
    assert green.low < min(by_seed[1:]) < green.value < green.high
    gain = mine.minus_baseline["green"]
    assert gain.value == pytest.approx(green.value - base.metrics["green"].value) and gain.n == len(cases)
    assert 0 <= gain.low < gain.value < gain.high
    assert set(base.minus_baseline.values()) == {None}


def test_a_gain_is_over_the_seeds_that_both_have(cases, measured):
    found = {("baseline", 1.0, 0): right(cases, 4), ("baseline", 1.0, 1): right(cases, 0)}
    cells = measured(found | {("+RPE", 1.0, 0): right(cases, 4), ("+DTS", 1.0, 7): right(cases, 4)})
    assert cells["+RPE", 1.0].minus_baseline["green"].value == 0
    assert cells["+DTS", 1.0].minus_baseline["green"] is None


def test_a_gain_on_a_part_of_the_patients_is_over_the_baseline_on_the_same_part(cases, measured):
    """It was over the baseline on all of them, which says nothing of the paper's few-shot claim."""
    found = {("baseline", 1.0, 0): right(cases, 4), ("baseline", 0.1, 0): right(cases, 1)}
    cells = measured(found | {("all", 0.1, 0): right(cases, 2), ("all", 0.3, 0): right(cases, 2)})
    few, none = cells["all", 0.1], cells["all", 0.3]
    gain = few.metrics["green"].value - cells["baseline", 0.1].metrics["green"].value
    assert few.minus_baseline["green"].value == pytest.approx(gain) and gain > 0
    assert none.minus_baseline["green"] is None


def test_a_single_seed_has_its_interval_over_patients(cases, measured):
    green = measured({("all", 1.0, 0): right(cases, 2)})["all", 1.0].metrics["green"]
    assert green.n == len(cases) and green.low < green.value < green.high


def test_every_metric_of_perfect_reports_is_perfect(cases, measured):
    cell = measured({("all", 1.0, 0): right(cases, 4)})["all", 1.0]
    values = {name: estimate.value for name, estimate in cell.metrics.items()}
    meteor = values.pop("meteor")  # its penalty for chunks leaves a little
    assert meteor > 0.98
    assert values == {name: pytest.approx(1.0) for name in ablation.METRICS if name != "meteor"}


def test_rows_stand_in_the_papers_order_beside_its_numbers(cases, measured):
    found = {(name, 1.0, 0): right(cases, 2) for name in reversed([*VARIANTS, DPO, PRIOR])}
    cells = measured(found | {("all", 0.3, 0): right(cases, 1)}, {("all", 0.3, 1): "out of memory"})
    assert list(cells) == [*((name, 1.0) for name in VARIANTS), ("all", 0.3), (DPO, 1.0), (PRIOR, 1.0)]
    published = [cell.published.get("green") for cell in cells.values()]
    assert published == [0.204, 0.277, 0.299, 0.233, 0.339, None, 0.4, None]
    assert cells[DPO, 1.0].published["meteor"] is None
    assert cells["all", 0.3].missing == ["out of memory"]


def test_where_nothing_was_trained_the_first_reason_is_given(measured):
    with pytest.raises(Failure, match="such as: out of memory"):
        measured({}, {("all", 1.0, 0): "out of memory"})


class Trained:
    """`run_trials` as it would have been: some reports a point; of the second seed +RPE has no memory, +DTS no time."""

    def __init__(self, cases):
        self.cases, self.plans, self.points = cases, {}, {}

    def __call__(self, plan, study, points, progress):
        self.plans[plan.stage], self.points[plan.stage] = plan, list(points)
        in_time = [point for point in points if (point.name, point.seed) != ("+DTS", 1)]
        return [self.trained(plan, point) for point in in_time]

    def trained(self, plan, point):
        if point.name == "+RPE" and point.seed == 1:
            return Trial(id=plan.id_of(point), point=point, status="infeasible", why="out of memory")
        n = [*VARIANTS, DPO, PRIOR].index(point.name)
        written = [_Text(text) for text in right(self.cases, n)]
        write_reports(plan.place(point, "reports.parquet"), self.cases, written, "?")
        return Trial(id=plan.id_of(point), point=point, status="done")


class _Text:
    tokens, finished = 3, True

    def __init__(self, text):
        self.text = text


@pytest.fixture
def trained(cases, monkeypatch):
    made, preferred = Trained(cases), []

    def prefer(checkpoint, data, out, experiment):
        preferred.append((checkpoint, out, experiment.seed, experiment.data.fraction))
        if experiment.data.fraction < 1 and experiment.seed == 1:
            raise Failure("no pairs: all ties")

    monkeypatch.setattr(ablation, "run_trials", made)
    monkeypatch.setattr(ablation, "concurrency", lambda *_: 1)
    monkeypatch.setattr(ablation, "prepare_features", lambda *_: None)
    monkeypatch.setattr(ablation, "prepare_reference", lambda *_: None)
    monkeypatch.setattr(ablation, "prefer", prefer)
    monkeypatch.setattr(ablation, "BertScore", Letters)
    made.preferred = preferred
    return made


def test_what_is_trained_is_each_variant_a_seed_and_dpo_on_pairs_of_its_own(trained, shards, vision, least, tmp_path):
    shown, out = [], str(tmp_path / "a")
    on_findings = shutil.copytree(vision, tmp_path / "vision") / Checkpoint.FILE
    described = json.loads(on_findings.read_text())
    described["experiment"]["contrastive"]["positives"] = "finding"
    on_findings.write_text(json.dumps(described))
    vision = str(on_findings.parent)
    found = ablation.run(shards.uri, vision, out, least(), 2, (0.5,), lambda *each: shown.append(each[:3]))
    sft, dpo = trained.points["sft"], trained.points["dpo"]
    whole = [*VARIANTS, "all", "baseline", PRIOR]
    assert sorted((p.seed, p.name) for p in sft) == sorted((seed, name) for seed in (0, 1) for name in whole)
    assert [p.seed for p in sft] == sorted(p.seed for p in sft)  # whole seeds first
    assert next(p for p in sft if p.name == "+RPE").params == VARIANTS["+RPE"]
    assert sft[0].params["model.tokenizer.attention"] == "absolute"
    for name in ("all", "baseline"):
        assert {p.params.get("data.fraction") for p in sft if p.name == name} == {None, 0.5}
    told = len({finding for case in shards.cases("train") for finding in findings_of(case.report)})
    assert {p.params["model.tokenizer.prior"] for p in sft if p.name == PRIOR} == {told} and told > 0
    assert {p.params["model.tokenizer.prior"] for p in sft if p.name != PRIOR} == {0}
    assert [p.keep for p in sft] == [p.name == "all" for p in sft]
    plan = trained.plans["dpo"]
    assert (plan.stage, plan.watch.split) == ("dpo", "test")
    assert len(dpo) == 3
    for point in dpo:
        data, init = plan.inputs(point)
        own = next(p for p in sft if (p.name, p.seed, p.params) == ("all", point.seed, point.params))
        assert init == trained.plans["sft"].checkpoint(own)
        assert (init, data, point.seed, point.params.get("data.fraction", 1)) in trained.preferred
        assert not point.data.startswith("/") and not point.init.startswith("/")  # it can be moved
    assert found["missing"] == {
        **{"+RPE/1.0/1": "out of memory", "+DTS/1.0/1": "not run in the time that was given"},
        "all + DPO/0.5/1": "no pairs: all ties",
    }
    assert ("preferences", 4, 4) in shown


def test_what_is_printed_written_and_shown_is_the_same(trained, shards, vision, least, tmp_path):
    out = str(tmp_path / "a")
    found = ablation.run(shards.uri, vision, out, least(), 2, (0.5,))
    assert storage.read_json(f"{out}/ablation.json") == json.loads(json.dumps(found))
    rows = pq.read_table(f"{out}/ablation.parquet").to_pylist()
    told = {(r["variant"], r["fraction"], r["metric"], r["what"]): r for r in rows}
    for cell in found["cells"]:
        green = told[cell["variant"], cell["fraction"], "green", "value"]
        assert {name: green[name] for name in ("value", "low", "high", "n")} == cell["metrics"]["green"]
        assert green["seeds"] == len(cell["seeds"]) and green["published"] == cell["published"].get("green")
    page = Path(out, "ablation.html").read_text()
    assert page.count("<svg") == 2
    assert all(text in page for text in ("0.204", "all ties", "over the batch", "out of memory"))
    assert "http" not in page.replace("http://www.w3.org", "")
    assert Path(out, "ablation.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(ablation.terminal([ablation.Cell.model_validate(cell) for cell in found["cells"]], found))
    text = console.export_text()
    assert "0.204" in text and DPO in text and "50%" in text


@pytest.mark.parametrize(
    ("fractions", "from_", "says"),
    [((0.0,), "vision", "above 0 and up to 1"), ((), "vision", "above 0"), ((1.0,), "written", "is of stage sft")],
)
def test_what_cannot_be_ablated_is_refused(shards, least, tmp_path, request, fractions, from_, says):
    init = request.getfixturevalue(from_)
    with pytest.raises(UserError, match=says):
        ablation.plan(shards.uri, init, str(tmp_path), least(), 1, fractions)

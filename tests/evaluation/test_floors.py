"""Floors and ceilings: what needs no model scores, and what a model's numbers are beside it."""

import json

import numpy as np
import pytest
from small_runs import case

from mu2llm.evaluation import floors
from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.evaluation.floors import Level, bounds, levels, typicality, written
from mu2llm.evaluation.results import TITLES
from mu2llm.evaluation.scoring import Texts
from mu2llm.evaluation.text_metrics import rouge
from mu2llm.green import load_judge
from mu2llm.records import Case, Estimate
from mu2llm.settings.green import JudgeConfig

RULES = load_judge(JudgeConfig())
CASES = [case(i) for i in range(12)]


def measured(cases, train=(), data=""):
    references = tuple(each.report for each in cases)
    texts = {
        floors.NAMES[run]: Texts(tuple(cases), references, tuple(reports))
        for run, reports in written(cases, train).items()
    }
    return bounds(texts, RULES, Bootstrap([each.patient for each in cases], 100), None, data)


def estimate(value):
    return Estimate(value=value, low=value - 0.1, high=value + 0.1, n=9)


def test_the_medoid_is_the_report_most_like_all():
    reports = ["The lung is clear.", "The lung is clear. No effusion.", "No effusion. No effusion.", "Liver cyst left."]
    expected = [
        np.mean([value[0] for value in rouge([(other, report) for other in reports])["rouge_1"].rows])
        for report in reports
    ]
    assert typicality(reports).tolist() == pytest.approx(expected)
    assert int(typicality(reports).argmax()) == 1


def test_what_is_written_without_a_model():
    reports = written(CASES, [case(i) for i in range(20, 30)])
    assert len(set(reports["prior"])) == 1 and reports["prior"][0] in {case(i).report for i in range(20, 30)}
    assert reports == written(CASES, [case(i) for i in range(20, 30)])
    assert reports["nearest"] == [each.report for each in CASES]  # training has one of the same findings
    distinct = [each.model_copy(update={"report": f"{each.report} {each.patient}."}) for each in CASES]
    for each, text in zip(distinct, written(distinct, [])["other_patient"], strict=True):
        assert not text.endswith(f"{each.patient}.")


def test_nearest_without_training_is_never_the_patients_own():
    distinct = [each.model_copy(update={"report": f"{each.report} {each.patient}."}) for each in CASES]
    for each, text in zip(distinct, written(distinct, [])["nearest"], strict=True):
        assert not text.endswith(f"{each.patient}.")
    alone = [case(0)]
    assert written(alone, [])["nearest"] == written(alone, [])["other_patient"] == [alone[0].report]


def test_the_table_writes_training_reports_for_what_a_report_names():
    train = [case(i) for i in range(20, 32)]
    reports = [each.report for each in CASES]
    shifted = reports[1:] + reports[:1]
    assert floors.table(CASES, train, shifted) == shifted  # not what is true, but what is named
    spoken = [f"In summary. {text}" for text in shifted]
    assert floors.table(CASES, train, spoken) == shifted
    assert set(floors.table(CASES, train, ["Nothing is known."] * 12)) == {case(21).report}  # the one without findings


def test_floors_lie_below_the_ceiling():
    found = measured(CASES)
    assert list(found) == ["constant", "other_patient", "nearest", "reference", "all_positive", "all_negative"]
    assert found["reference"]["rouge_1"].value == found["reference"]["finding_f1"].value == 1
    assert found["all_negative"]["crg"].value == found["all_positive"]["crg"].value == pytest.approx(1 / 3)
    assert found["all_negative"]["ce_macro_f1"].value == 0 < found["all_positive"]["ce_macro_f1"].value
    assert found["all_positive"]["finding_recall"].value == 1
    assert "bleu_1" not in found["all_positive"]


def test_the_ceiling_of_labels_is_what_the_rules_read_of_the_reference():
    wrong = [each.model_copy(update={"labels": {"Emphysema": 1, "Pleural effusion": 1}}) for each in CASES]
    assert 0 < measured(wrong)["reference"]["ce_macro_f1"].value < 1


def test_levels_and_what_is_said_of_them():
    found = measured(CASES)
    metrics = {"rouge_1": estimate(found["constant"]["rouge_1"].value), "bleu_1": estimate(0.99), "meteor": None}
    metrics |= {"ce_macro_f1": estimate(0.01), "finding_recall": estimate(0.1), "not known": estimate(0.5)}
    beside = levels(metrics, found)
    assert set(beside) <= {"rouge_1", "bleu_1", "ce_macro_f1"}  # precision and recall alone are traded
    assert beside["bleu_1"].share > 0.5 and not beside["bleu_1"].below
    labels = beside["ce_macro_f1"]
    assert labels.share < 0 and labels.floor == max(found[name]["ce_macro_f1"].value for name in floors.FLOORS)
    expected = f"below its floor: 18 labels, macro F1 0.010 ({labels.of} {labels.floor:.3f})"
    assert floors.describe(beside, TITLES, ("ce_macro_f1",)) == expected
    assert floors.describe({"bleu_1": beside["bleu_1"]}, TITLES) == ""
    at = Level(value=0.3, low=0.2, floor=0.3, of="constant", ceiling=1)
    assert at.below and floors.describe({"crg": at}, TITLES).startswith("this is the floor")


def test_a_floor_at_the_ceiling_says_nothing():
    same = [Case(id=str(i), patient=str(i), volume="", report="No pleural effusion.") for i in range(4)]
    assert "rouge_1" not in levels({"rouge_1": estimate(0.5)}, measured(same))


def test_floors_are_kept_with_the_data(tmp_path, monkeypatch):
    (tmp_path / "shards.json").write_text("{}")
    first = measured(CASES, data=str(tmp_path))
    [kept] = (tmp_path / "floors").iterdir()
    assert set(json.loads(kept.read_text())) == set(first)
    monkeypatch.setattr(floors, "text_metrics", lambda pairs: pytest.fail("measured again"))
    assert measured(CASES, data=str(tmp_path)) == first


def test_the_constant_on_ct_rate(shared):
    """FIELD.md §1: one constant report 0.57 ROUGE-1, all positive macro-F1 0.31, trivial CRG a third."""
    lines = (shared / "data" / "reports" / "ct_reports.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "CT-CLIP" in row["source"]][:120]
    cases = [Case(id=r["id"], patient=r["id"], volume="", report=r["text"], labels=r["labels"]) for r in rows]
    found = measured(cases)
    assert 0.5 < found["constant"]["rouge_1"].value < 0.62
    assert 0.25 < found["all_positive"]["ce_macro_f1"].value < 0.4
    assert found["other_patient"]["rouge_1"].value < found["constant"]["rouge_1"].value
    assert found["nearest"]["ce_macro_f1"].value > 0.5
    assert 0.85 < found["reference"]["ce_macro_f1"].value < 1

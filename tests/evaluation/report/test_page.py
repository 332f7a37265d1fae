"""The page stands alone, shows everything, and takes no text for markup."""

import re
from html.parser import HTMLParser

import pytest

from mu2llm.engine.predictions import Prediction
from mu2llm.evaluation.audits import Audit
from mu2llm.evaluation.floors import Level
from mu2llm.evaluation.report import write_report
from mu2llm.evaluation.report.page import choose
from mu2llm.evaluation.results import Difference, Group, Header, Results, RunResult
from mu2llm.records import Case, Estimate, Finding, Judgement

EVIL = "</script><script>alert(1)</script> No pleural effusion."
NAMES = ("finding_f1", "green", "ce_macro_f1", "bleu_1", "rouge_l", "meteor", "bert_score")
CASES = [
    Case(id=f"c{i}", patient=f"p{i}", volume="", report="Left pleural effusion.", findings=(Finding(name="x"),))
    for i in range(5)
]


def estimate(value):
    return Estimate(value=value, low=value / 2, high=(1 + value) / 2, n=5)


def run(value, reasons=(), scores=(1.0, 0.5, None, 0.0, 0.75)):
    contrast = {"without": estimate(0.1), "gain": estimate(value)}
    audit = Audit(
        passed=not reasons,
        reasons=list(reasons),
        warnings=["2 of 5 reports were cut off at the longest length"],
        contrasts={v: {"finding_f1": contrast, "green_rules": contrast} for v in ("shuffled", "zeroed", "prior")},
        distinct_reports=0.8,
        most_frequent_report="Normal.",
        most_frequent_share=0.4,
        overlooked=None,
        laterality=estimate(0.5),
        words=(1, 2, 3),
        reference_words=(4, 5, 6),
        cut_off=0.4,
        invalid={"why": 1},
    )
    groups = [Group(name="renal cyst", n=3, metrics={"precision": estimate(0.3), "recall": None, "f1": estimate(0.4)})]
    region = {name: estimate(0.5) for name in ("finding_f1", "green_rules", "bleu_1", "rouge_l")}
    return RunResult(
        metrics={name: estimate(value) for name in NAMES},
        levels={"green": Level(value=value, low=value / 2, floor=0.2, of="constant", ceiling=0.9)},
        audit=audit,
        findings=groups,
        labels=groups,
        regions=[Group(name="chest", n=5, metrics=region)],
        green=list(scores),
    )


def results(out):
    header = Header(
        identity="x",
        checkpoints={"sft": "a", "dpo": "b"},
        data=str(out / "gone"),
        split="test",
        question="q",
        seed=0,
        prior="one of 3 training reports",
        histories={"dpo": [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}], "sft": [{"step": 1, "loss": 1.0}]},
    )
    return Results(
        header=header,
        cases=5,
        judge="rules@1",
        truth="the cases' own findings",
        notes={"bleu": "b", "rouge": "r", "meteor": "m", "bert_score": "e", "prior": "p", "intervals": "i"},
        split_hash="0a1b2c3d4e5f",
        floors={"constant": {"green": estimate(0.2)}, "reference": {"green": estimate(0.9)}},
        runs={"sft": run(0.3, ["finding_f1 is much the same"]), "dpo": run(0.5)},
        differences=[Difference(ours="dpo", theirs="sft", metrics={"green": estimate(0.2)})],
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("page")
    predictions = [
        Prediction(
            **{"run": name, "case_id": case.id, "variant": "as_is", "region": None, "question": "q", "index": 0},
            **{"text": EVIL, "tokens": 3, "finished": True, "scan_of": case.id, "seed": 0},
        )
        for name in ("sft", "dpo")
        for case in CASES
    ]
    judgements = {(p.run, p.case_id): Judgement(valid=False, score=None, why="refused") for p in predictions}
    write_report(str(tmp_path), results(tmp_path), CASES, predictions, judgements, pages=3)
    return (tmp_path / "report.html").read_text()


def test_nothing_is_loaded_from_elsewhere(page):
    for found in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page):
        assert found.startswith(("#", "data:")), found
    assert "@import" not in page and "<link" not in page


def test_texts_are_texts(page):
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_all_is_there(page):
    for text in ("dpo − sft", "does not look at the scan: finding_f1 is much the same", "renal cyst", "cut off"):
        assert text in page
    for text in ("invalid", "refused", "chest", "+0.20", "one of 3 training reports", "dpo: 0.7 → 0.5"):
        assert text in page
    for text in ("0a1b2c3d4e5f", "one typical training report for all", "floor: no model", "↑ 43 %"):
        assert text in page
    assert page.count("<article>") == 3
    assert page.count("<svg role") == 4
    assert "var(--run-1)" in page and "#0a000" not in page


def test_it_is_well_formed(page):
    open_tags = []
    void = {"meta", "input", "br", "link", "img"}

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                open_tags.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Checker().feed(page)
    assert not open_tags


def test_cases_are_chosen_from_best_to_worst(tmp_path):
    assert [case.id for case in choose(CASES, results(tmp_path), 3)] == ["c0", "c1", "c2"]
    assert [case.id for case in choose(CASES, results(tmp_path), 99)] == ["c0", "c4", "c1", "c3", "c2"]
    assert choose(CASES, results(tmp_path), 0) == []

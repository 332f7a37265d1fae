"""Texts longer than the model takes: found by case, refused, left out or cut."""

import csv
import io
import logging

import pytest

from mu2llm import config
from mu2llm.errors import UserError
from mu2llm.model import build, build_processor
from mu2llm.records import Case, Question
from mu2llm.stages import lengths

SENTENCE = "There is a large left pleural effusion."
QUESTION = "Write the radiology report of this CT scan."
REPORTS = {"short": SENTENCE, "long": " ".join([SENTENCE] * 40), "longer": " ".join([SENTENCE] * 80)}


def processor(*overrides):
    settings = config.load("tiny", ["model.max_text_tokens=60", *overrides])
    return build_processor(settings.model, settings.data.spec, list(REPORTS.values()))


def test_the_processor_alone_is_that_of_the_model():
    settings = config.load("tiny")
    alone = build_processor(settings.model, settings.data.spec, list(REPORTS.values()))
    _, whole = build(settings.model, settings.data.spec, list(REPORTS.values()))
    assert alone.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert alone.token_ids(QUESTION, SENTENCE) == whole.token_ids(QUESTION, SENTENCE)


def test_cases_are_named_with_their_tokens():
    ours = processor()
    found = lengths.too_long(ours, {name: [(QUESTION, report)] for name, report in REPORTS.items()})
    assert list(found) == ["long", "longer"]
    assert found == {name: ours.text_tokens(QUESTION, REPORTS[name]) for name in found}
    with pytest.raises(UserError, match=r"2 of 3 cases .* 60 tokens .*long \(\d+ tokens\).*max_text_tokens=\d+"):
        lengths.settle(found, 3, 60, "refuse")


@pytest.mark.parametrize(("setting", "says"), [("skip", "left out"), ("truncate", "cut")])
def test_what_is_let_in_is_counted(setting, says, caplog):
    with caplog.at_level(logging.WARNING):
        lengths.settle({"long": 900}, 3, 60, setting)
    assert "1 of 3 cases" in caplog.text and says in caplog.text and "long (900 tokens)" in caplog.text


def test_own_questions_count_where_they_are_asked():
    questions = (Question(question="What is seen?", answer=REPORTS["long"]),)
    case = Case(id="a", patient="a", volume="v", report=SENTENCE, questions=questions)
    assert not lengths.too_long(processor(), {"a": lengths.asked_of(case, QUESTION, 1)})
    assert lengths.too_long(processor(), {"a": lengths.asked_of(case, QUESTION, 0.8)})


def test_what_is_cut_ends_with_a_sentence_and_fits():
    ours = processor()
    cut = lengths.shortened(ours, QUESTION, REPORTS["long"])
    assert cut.endswith("effusion.") and REPORTS["long"].startswith(cut)
    assert ours.text_tokens(QUESTION, cut) <= 60
    assert lengths.shortened(ours, QUESTION, SENTENCE) == SENTENCE
    assert ours.text_tokens(QUESTION, lengths.shortened(ours, QUESTION, "word " * 500)) <= 60


def test_the_long_report_that_others_reported(shared):
    text = (shared / "data" / "text" / "train-long-report" / "m.csv").read_text("utf-8-sig")
    reports = {row["id"]: row["report"] for row in csv.DictReader(io.StringIO(text))}
    settings = config.load("tiny")
    ours = build_processor(settings.model, settings.data.spec, list(reports.values()))
    assert list(lengths.too_long(ours, {name: [(QUESTION, report)] for name, report in reports.items()})) == ["003"]

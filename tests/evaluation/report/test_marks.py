"""Sentences that are right, wrong or missed; words that differ; a judgement as lines."""

from mu2llm.evaluation.report.marks import changes, mark, verdicts
from mu2llm.green import load_judge
from mu2llm.records import Finding
from mu2llm.settings.green import JudgeConfig

TRUTH = [Finding(name="pleural effusion", side="left"), Finding(name="liver lesion")]


def marks(text, truth=TRUTH, absent="wrong"):
    return [sentence.mark for sentence in mark(text, truth, absent)]


def test_a_sentence_is_right_if_all_that_it_states_is_there():
    text = "Left pleural effusion. Right pleural effusion. Hypodense liver lesion. Small pneumothorax."
    assert marks(text) == ["right", "wrong", "right", "wrong"]


def test_what_denies_or_says_nothing_is_plain():
    assert marks("No pneumothorax. The aorta is normal.") == ["plain", "plain"]


def test_both_sides_need_both():
    assert marks("Bilateral pleural effusions.") == ["wrong"]
    assert marks("Bilateral pleural effusions.", [Finding(name="pleural effusion", side="bilateral")]) == ["right"]


def test_without_a_side_the_name_is_enough():
    assert marks("Pleural effusion.") == ["right"]


def test_in_a_reference_it_is_missed():
    assert marks("There is a left pleural effusion.", [], "missed") == ["missed"]


def test_changes_put_together_are_the_texts():
    old, new = "No effusion. The liver is normal.", "Small effusion. The liver is not normal."
    pieces = changes(old, new)
    assert "".join(p.text for p in pieces if p.kind != "ins") == old
    assert "".join(p.text for p in pieces if p.kind != "del") == new
    assert {p.text.strip() for p in pieces if p.kind == "ins"} == {"Small", "not"}
    assert changes("same words", "same words")[0].kind == "same"


def test_a_judgement_is_told_sentence_by_sentence():
    pair = ("Left pleural effusion. Liver lesion.", "Left pleural effusion. Right pneumothorax.")
    [judgement] = load_judge(JudgeConfig()).judge([pair])
    lines = verdicts(judgement)
    assert [(line.kind, line.category) for line in lines] == [
        ("matched", ""),
        ("significant", "a"),
        ("significant", "b"),
    ]
    assert "pneumothorax" in lines[1].text and "liver lesion" in lines[2].text

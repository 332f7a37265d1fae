"""Lines in, JSON out: what the commands print."""

import json

import pytest

from mu2llm.errors import UserError
from mu2llm.green import LABELS, label_lines, load_judge, parse_lines, score_lines, score_pairs
from mu2llm.settings.green import JudgeConfig

JUDGE = load_judge(JudgeConfig(name="rules"))
PAIR = {"reference": "Left pleural effusion.", "candidate": "Left pleural effusion. Emphysema."}
ANSWER = "[Clinically Significant Errors]:\nNone.\n[Clinically Insignificant Errors]:\nNone.\n[Matched Findings]:\n0."


def lines(*rows: object) -> list[str]:
    return [json.dumps(row) + "\n" for row in rows]


def test_scores():
    silent, lost = ({"reference": "Clear lungs.", "candidate": ""}, {"reference": "", "candidate": "Clear lungs."})
    found = score_lines(lines(PAIR, silent, lost), JUDGE)
    assert found == score_pairs([PAIR, silent, lost], JUDGE)
    assert [found[name] for name in ("mean", "n_valid", "n_invalid", "n_failed")] == [0.25, 2, 1, 1]
    assert found["results"][0] == {
        "score": 0.5,
        "significant": [1, 0, 0, 0, 0, 0],
        "insignificant": [0] * 6,
        "matched": 1,
        "valid": True,
        "why": "",
        "judge": JUDGE.identity,
    }
    assert found["results"][1]["score"] == 0.0 and "empty" in found["results"][1]["why"]
    assert found["results"][2]["score"] is None and "empty" in found["results"][2]["why"]
    assert json.loads(json.dumps(found)) == found


def test_nothing_valid_has_no_mean():
    assert score_pairs([], JUDGE) == {"results": [], "mean": None, "n_valid": 0, "n_invalid": 0, "n_failed": 0}


def test_lists_of_the_same_length_are_pairs():
    both = {"reference": [PAIR["reference"]] * 2, "candidate": [PAIR["candidate"], "Clear."]}
    assert [r["score"] for r in score_lines(lines(both), JUDGE)["results"]] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("not json", "not JSON"),
        ('{"reference": "a", ', "not JSON"),
        ("[1, 2]", "'reference'"),
        ('"text"', "'reference'"),
        ('{"reference": "a"}', "'candidate'"),
        ('{"candidate": "a"}', "'reference'"),
        ('{"reference": "a", "candidate": null}', "candidate must be text, given NoneType"),
        ('{"reference": 1, "candidate": "a"}', "reference must be text, given int"),
        ('{"reference": ["a", "b"], "candidate": ["a"]}', "2 reference but 1 candidate"),
        ('{"reference": ["a"], "candidate": "a"}', "reference must be text, given list"),
        ('{"reference": [["a"]], "candidate": ["a"]}', "reference must be text, given list"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(bad, why):
    with pytest.raises(UserError, match="line 3") as error:
        score_lines([*lines(PAIR), "\n", bad], JUDGE)
    assert why in str(error.value) and "\n" not in str(error.value)


def test_bad_rows_are_named():
    with pytest.raises(UserError, match="line 2: expected an object with the field 'candidate'"):
        score_pairs([PAIR, {"reference": "a"}], JUDGE)


def test_answers():
    valid, invalid = parse_lines(lines({"text": ANSWER}, {"text": "Please provide the report."}))
    assert valid == {
        "valid": True,
        "score": 0.0,
        "significant": [0] * 6,
        "insignificant": [0] * 6,
        "matched": 0,
        "why": "",
    }
    assert invalid["valid"] is False and invalid["score"] is None and invalid["why"]
    with pytest.raises(UserError, match="line 1: expected an object with the field 'text'"):
        parse_lines(lines({"answer": ANSWER}))


def test_labels():
    found = label_lines(lines({"text": "Emphysema. No pleural effusion."}, {"text": ""}))
    assert list(found[0]) == list(LABELS) and len(LABELS) == 18
    assert found[0]["Emphysema"] == 1 and sum(found[0].values()) == 1
    assert sum(found[1].values()) == 0
    with pytest.raises(UserError, match="line 2"):
        label_lines([*lines({"text": "a"}), "{"])


def test_odd_characters_and_long_reports_are_answered():
    odd = ["\ud800 effusion", "\x00\x1b[31m", "Left pleural effusion. " * 3000, "a\u2028b", "é" * 10_000]
    rows = [{"reference": "Left pleural effusion.", "candidate": text} for text in odd]
    found = score_lines(lines(*rows), JUDGE)
    assert len(found["results"]) == len(odd)
    assert [r["valid"] == (r["score"] is not None) for r in found["results"]] == [True] * len(odd)
    assert found["results"][2]["score"] == 1.0
    assert len(label_lines(lines(*({"text": text} for text in odd)))) == len(odd)
    assert len(parse_lines(lines(*({"text": text} for text in odd)))) == len(odd)

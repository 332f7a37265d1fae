"""CRIMSON by its own package, asked of a small server here."""

import json
import re

import pytest

pytest.importorskip("CRIMSON", reason="crimson-score is not installed")

from green_server import serving

from mu2llm.errors import UserError
from mu2llm.green import check_judge, decides, load_judge, measures
from mu2llm.green.crimson import Crimson
from mu2llm.settings.green import JudgeConfig


def finding(name, text, significance="urgent"):
    return {"id": name, "finding": text, "clinical_significance": significance}


def answer(reference, predicted, matched, attributes=()):
    paired = {each for pair in matched for each in pair}
    return {
        "reference_findings": reference,
        "predicted_findings": predicted,
        "matched_findings": [{"ref_id": r, "pred_id": p} for r, p in matched],
        "errors": {
            "false_findings": [each["id"] for each in predicted if each["id"] not in paired],
            "missing_findings": [each["id"] for each in reference if each["id"] not in paired],
            "attribute_errors": list(attributes),
        },
    }


R1, P1 = finding("R1", "left pneumothorax"), finding("P1", "pneumothorax")
R2, P2 = finding("R2", "small nodule", "actionable_not_urgent"), finding("P2", "effusion", "benign_expected")
WRONG_SIDE = {
    "ref_id": "R1",
    "pred_id": "P1",
    "severity": "significant",
    "error_types": ["location"],
    "explanation": "x",
}


@pytest.mark.parametrize(
    ("given", "score", "significant", "insignificant", "matched"),
    [
        (answer([R1], [P1], [("R1", "P1")]), 1, (0,) * 6, (0,) * 6, 1),
        (answer([R1, R2], [P1], [("R1", "P1")]), 0.6667, (0, 1, 0, 0, 0, 0), (0,) * 6, 1),
        (answer([R1], [P1], [("R1", "P1")], [WRONG_SIDE]), 0.6667, (0, 0, 1, 0, 0, 0), (0,) * 6, 1),
        (answer([R1], [P1, P2], [("R1", "P1")]), 1, (0,) * 6, (1, 0, 0, 0, 0, 0), 1),
        (answer([], [P1], []), -0.5, (1, 0, 0, 0, 0, 0), (0,) * 6, 0),
        (answer([R1], [], []), 0, (0, 1, 0, 0, 0, 0), (0,) * 6, 0),
        (answer([], [], []), 1, (0,) * 6, (0,) * 6, 0),
    ],
)
def test_the_published_score_and_what_it_is_made_of(given, score, significant, insignificant, matched):
    read = Crimson("m").read(json.dumps(given))
    assert read.valid and read.score == pytest.approx(score, abs=1e-4)
    assert (read.significant, read.insignificant, read.matched) == (significant, insignificant, matched)


@pytest.mark.parametrize(
    "text", ["", "no", "{}", "[]", "null", '{"errors": {}}', json.dumps(answer([R1], [], []))[:-9]]
)
def test_what_is_no_answer_is_invalid(text):
    read = Crimson("m").read(text)
    assert not read.valid and read.score is None and "CRIMSON asks for" in read.why


@pytest.mark.parametrize("dress", ["```json\n{}\n```", "<think>R1 is {{}}</think>{}", "  {}\n"])
def test_what_an_answer_is_dressed_in_is_taken_off(dress):
    text = json.dumps(answer([R1], [P1], [("R1", "P1")]))
    assert Crimson("m").read(dress.replace("{}", text, 1) if "{{" not in dress else dress.format(text)).score == 1


def test_it_is_asked_as_published_and_judges_whole_reports():
    def reply(request):
        said = re.search(r"Predicted Findings \(Candidate\):\n(.*)\n", request["messages"][-1]["content"])[1]
        return json.dumps(answer([R1], [P1], [("R1", "P1")]) if "pneumothorax" in said else answer([R1], [P2], []))

    long = "There is a left pneumothorax. " * 120
    with serving(reply) as server:
        config = JudgeConfig(name=f"crimson:judge@{server.url}")
        judge = load_judge(config)
        right, empty, wrong = judge.judge(
            [("Left pneumothorax.", long), ("Left pneumothorax.", ""), ("Clear.", "Clear.")]
        )
    assert (right.score, empty.score, empty.failed, wrong.score) == (1, 0, True, 0)
    assert measures(judge) == "crimson" and "crimson-score" in right.judge and "whole reports" in right.judge
    request = server.requests[0]
    assert len(server.requests) == 2 and request["messages"][0]["role"] == "system"
    assert request["response_format"] == {"type": "json_object"} and request["max_tokens"] == 8192
    assert "significance" in request["messages"][1]["content"]
    assert decides(config)["judge.rubric"].startswith("crimson-score")


def test_its_own_model_gets_the_prompt_it_was_trained_on():
    own, other = Crimson("rajpurkarlab/medgemma-4b-it-crimson").fill("A.", "B."), Crimson("gpt").fill("A.", "B.")
    assert len(own) < len(other) and "A." in own and "B." in own


def test_without_the_package_it_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "CRIMSON.generate_score", None)
    with pytest.raises(UserError, match=r"mu2llm\[crimson\]"):
        check_judge(JudgeConfig(name="crimson:m@http://localhost/v1"))

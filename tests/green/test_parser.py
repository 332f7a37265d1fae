"""The parser of judges' answers."""

import json

import pytest

from mu2llm.green import parse


def test_agrees_with_the_published_parser_on_real_answers(shared):
    refused = []
    for line in (shared / "data" / "green" / "judge_outputs.jsonl").read_text().splitlines():
        answer = json.loads(line)
        judgement, expected = parse(answer["text"]), answer["expected"]
        if not judgement.valid:
            refused.append(answer["id"])
            continue
        assert list(judgement.significant) == expected["sig"], answer["id"]
        assert list(judgement.insignificant) == expected["insig"], answer["id"]
        assert judgement.matched == expected["matched"], answer["id"]
        assert judgement.score == pytest.approx(expected["green"]), answer["id"]
    assert sorted(refused) == ["g0008", "g0228"]  # “please provide the candidate report”

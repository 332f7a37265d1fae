"""Other words for the same: the rules read alike, and their judge gives full marks."""

import json

import pytest

from mu2llm.green import findings, judge_reworded, load_judge, reworded
from mu2llm.settings.green import JudgeConfig

JUDGE = load_judge(JudgeConfig())


@pytest.mark.parametrize(
    ("report", "other"),
    [
        ("Pleural effusion was not detected.", "Pleural fluid was not seen."),
        ("A small nodule is observed in the left lung.", "A minimal nodular lesion is seen in the left lung."),
        ("The liver is normal.", "The liver is unremarkable."),
        ("Left hiatal matters.", "Left hiatal matters."),
    ],
)
def test_words_are_exchanged(report, other):
    assert reworded(report) == other


def test_a_reworded_reference_is_the_reference_to_the_rules(shared):
    lines = (shared / "data" / "reports" / "ct_reports.jsonl").read_text().splitlines()
    reports = [row["text"] for row in map(json.loads, lines) if "CT-CLIP" in row["source"]][:40]
    others = [reworded(report) for report in reports]
    changed = [a != b for a, b in zip(reports, others, strict=True)]
    assert sum(changed) > 35
    for report, other in zip(reports, others, strict=True):
        assert [f.name for f in findings(report)] == [f.name for f in findings(other)]
    scores = [judgement.score for judgement in judge_reworded(JUDGE, reports) if judgement.valid]
    assert sum(scores) / len(scores) >= 0.9

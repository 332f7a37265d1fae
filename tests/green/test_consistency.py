"""Findings against the impression of the same report."""

import numpy as np
import pytest

from mu2llm.ct.phantom.plan import draw_plan
from mu2llm.ct.phantom.report import write_report
from mu2llm.green import agreement, parts


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("Findings: A. B.\nIMPRESSION: C.", ("A. B.", "C.")),
        ("A nodule.", ("A nodule.", "")),
        ("FINDINGS\nA.\n\nIMPRESSION\nC.\n", ("A.", "C.")),
        ("**Impression:** C. **Findings:** A.", ("A.", "C.")),
        ('Heart is normal. " Nodule on the left " Emphysema', ("Heart is normal.", 'Nodule on the left " Emphysema')),
        ("Findings: the impression of a mass. Conclusion: a mass.", ("the impression of a mass.", "a mass.")),
    ],
)
def test_the_parts_of_a_report(report, expected):
    assert parts(report) == expected


def found(findings, impression):
    return agreement(f"Findings: {findings} Impression: {impression}")


@pytest.mark.parametrize(
    ("findings", "impression"),
    [
        ("There is a large left pleural effusion. No pneumothorax.", "Left pleural effusion."),
        ("Solid nodule of 12 mm in the left upper lobe.", "Left upper lobe nodule of 1.2 cm."),
        ("Pleural effusion on the left. Pleural effusion on the right.", "Bilateral pleural effusion."),
        ("Consolidation in the right lower lobe.", "Pneumonia on the right."),
        ("No pleural effusion. The liver is normal.", "No acute abnormality."),
    ],
)
def test_parts_that_agree(findings, impression):
    result = found(findings, impression)
    assert (result.unsupported, result.omitted, result.contradicted) == ((), (), ())


@pytest.mark.parametrize(
    ("findings", "impression", "kinds"),
    [
        ("Large pleural effusion on the left.", "Large left pneumothorax.", {"unsupported", "omitted"}),
        ("No pneumothorax.", "Left pneumothorax.", {"unsupported", "contradicted"}),
        ("Left pneumothorax.", "Right pneumothorax.", {"unsupported", "contradicted"}),
        ("Left pleural effusion.", "Bilateral pleural effusions.", {"unsupported", "contradicted"}),
        ("Liver lesion of 2 cm.", "Liver lesion of 31 mm.", {"unsupported", "contradicted"}),
        ("Left pleural effusion.", "No pleural effusion.", {"omitted", "contradicted"}),
        ("No pleural effusion on the right.", "Left pleural effusion.", {"unsupported"}),
        ("Left pleural effusion. Emphysema.", "Left pleural effusion.", {"omitted"}),
    ],
)
def test_parts_that_differ(findings, impression, kinds):
    result = found(findings, impression)
    assert {kind for kind in ("unsupported", "omitted", "contradicted") if getattr(result, kind)} == kinds


def test_what_differs_is_told():
    assert found("No pneumothorax.", "Left pneumothorax.").contradicted == ("left pneumothorax: the findings deny it",)
    assert found("Liver lesion of 2 cm.", "Liver lesion of 31 mm.").contradicted == (
        "31 mm liver lesion: 20 mm in the findings",
    )


@pytest.mark.parametrize(
    "report", ["Left pleural effusion.", "Impression: Emphysema.", "Findings: x. Impression: .", ""]
)
def test_one_part_alone_cannot_disagree(report):
    assert agreement(report) is None


def test_reports_of_phantoms_agree_with_themselves():
    for index in range(60):
        report, _ = write_report(draw_plan(0, index, 0.3), np.random.default_rng(index))
        result = agreement(report)
        assert (result.unsupported, result.omitted, result.contradicted) == ((), (), ()), report

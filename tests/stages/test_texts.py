"""What the rules read in reports, as positives of contrast and findings of the diagnostic prior."""

import pytest

from mu2llm.errors import UserError
from mu2llm.stages.texts import findings_of, most_frequent

REPORT = "There is a 12 mm nodule in the right upper lobe. Small left pleural effusion. No pneumothorax."


def test_placed_findings_are_told_with_and_without_their_place():
    assert findings_of(REPORT) == ["right lung nodule", "left pleural effusion"]
    placed = ["right lung nodule", "right upper lobe lung nodule", "left pleural effusion"]
    assert findings_of(REPORT, "placed_finding") == placed


def test_the_most_frequent_findings_are_of_the_positives():
    reports = [REPORT, "There is a nodule in the right upper lobe.", "There is a nodule in the right lower lobe."]
    assert most_frequent(reports, 2) == ["left pleural effusion", "right lung nodule"]
    assert most_frequent(reports, 2, "placed_finding") == ["right lung nodule", "right upper lobe lung nodule"]
    with pytest.raises(UserError, match="4 different findings; set 4 or fewer"):
        most_frequent(reports, 5, "placed_finding")

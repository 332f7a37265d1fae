"""What the rules read in a report."""

import pytest

from mu2llm.green import findings, sentences


def read(text: str) -> set[tuple[str, str | None, str | None, float | None]]:
    return {(f.name, f.side, f.place, f.size_mm) for f in findings(text)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There is a large left pleural effusion.", ("pleural effusion", "left", None, None)),
        (
            "Fluid layers dependently on the right, consistent with a small pleural effusion.",
            ("pleural effusion", "right", None, None),
        ),
        ("Effusion is seen in the left hemithorax.", ("pleural effusion", "left", None, None)),
        ("The right lung is partially collapsed by a large pneumothorax.", ("pneumothorax", "right", None, None)),
        ("Airspace consolidation in the left lower lobe.", ("consolidation", "left", "lower lobe", None)),
        ("The right middle lobe contains a 1.2 cm solid nodule.", ("lung nodule", "right", "middle lobe", 12.0)),
        ("Pulmonary nodule of 8 x 6 mm in the apex of the left lung.", ("lung nodule", "left", "upper lobe", 8.0)),
        ("Fluid surrounds the heart.", ("pericardial effusion", None, None, None)),
        ("A hypodense hepatic lesion measures 22 mm.", ("liver lesion", None, None, 22.0)),
        ("Lesion in segment 7 of the liver.", ("liver lesion", None, "segment 7", None)),
        ("The left kidney contains a 3 cm cyst in its lower pole.", ("renal cyst", "left", "lower pole", 30.0)),
        ("The T11 vertebral body is diffusely sclerotic.", ("vertebral sclerosis", None, "T11", None)),
        ("Bilateral hydronephrosis.", ("hydronephrosis", "bilateral", None, None)),
        ("Cholelithiasis.", ("gallstones", None, None, None)),
        ("Free fluid in the abdomen.", ("ascites", None, None, None)),
        ("Possible pneumonia in the right lower lobe.", ("pneumonia", "right", "lower lobe", None)),
    ],
)
def test_a_finding_with_its_attributes(text, expected):
    assert read(text) == {expected}


@pytest.mark.parametrize(
    "text",
    [
        "No pleural effusion.",
        "No evidence of pneumothorax or consolidation.",
        "Pleural effusion was not detected.",
        "The lungs are without consolidation.",
        "The pericardium is normal without effusion.",
        "No solid nodule in either lung.",
        "Neither consolidation nor atelectasis.",
        "The liver is homogeneous without focal lesion.",
        "Pneumothorax is absent.",
        "The effusion has resolved.",
        "The nodule, which was observed in the previous examination, was not detected.",
        "In the previous examination, there was a consolidation.",
        "No filling defect was detected in favor of pulmonary embolism.",
        "History of pneumonia.",
        "An infection cannot be ruled out (atelectasis?).",
        "A pneumothorax cannot be excluded.",
        "CT for the evaluation of pulmonary embolism.",
        "",
    ],
)
def test_what_is_denied_left_open_or_past_is_no_finding(text):
    assert read(text) == set()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("No pneumothorax, but a small left pleural effusion.", {"pleural effusion"}),
        ("No mass was detected, and there is emphysema.", {"emphysema"}),
        ("No pneumothorax and small left effusion.", {"pleural effusion"}),
        ("Atelectasis was observed, pleural effusion was not detected.", {"atelectasis"}),
        ("No significant change in the left pleural effusion.", {"pleural effusion"}),
        ("A nodule without calcification.", {"lung nodule"}),
        ("No pneumothorax; consolidation of the left lower lobe.", {"consolidation"}),
    ],
)
def test_a_denial_reaches_only_so_far(text, names):
    assert {f.name for f in findings(text)} == names


def test_each_of_several_findings_has_its_own_words():
    assert read("Small right pleural effusion and consolidation in the left lower lobe.") == {
        ("pleural effusion", "right", None, None),
        ("consolidation", "left", "lower lobe", None),
    }
    assert read("There is a 2 cm cyst in the right kidney and a 5 mm lesion in the liver.") == {
        ("renal cyst", "right", None, 20.0),
        ("liver lesion", None, None, 5.0),
    }


def test_what_is_listed_together_shares_side_and_place():
    assert read("Consolidation and atelectasis in the left lower lobe.") == {
        ("consolidation", "left", "lower lobe", None),
        ("atelectasis", "left", "lower lobe", None),
    }


def test_body_and_impression_are_one_finding():
    text = "Findings: 12 mm nodule in the right upper lobe. Impression: Right upper lobe nodule."
    assert read(text) == {("lung nodule", "right", "upper lobe", 12.0)}


def test_two_sides_are_two_findings():
    text = "There is a left pleural effusion. A right pleural effusion is also seen."
    assert {side for _, side, _, _ in read(text)} == {"left", "right"}


def test_phantom_reports_are_read_without_error():
    phantom = pytest.importorskip("mu2llm.ct.phantom")
    for index in range(5):
        made = phantom.make(seed=5, index=index)
        got = {(f.name, f.side) for f in findings(made.report)}
        assert got == {(f.name, f.side) for f in made.findings}, made.report


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two.", ["One.", "Two."]),
        ("A 3.5 cm nodule. Next.", ["A 3.5 cm nodule.", "Next."]),
        ("Findings:\n1. Lungs clear.\n2. No effusion", ["Lungs clear.", "No effusion"]),
        ("FINDINGS: Clear. IMPRESSION: Normal.", ["Clear.", "Normal."]),
        ('Clear lungs. " Normal heart', ["Clear lungs.", "Normal heart"]),
        ("A cyst.Liver normal.", ["A cyst.", "Liver normal."]),
        ("Seen by Dr. Smith today.", ["Seen by Dr. Smith today."]),
        ("CT dated 16.03. 2016 shows it.", ["CT dated 16.03. 2016 shows it."]),
        ("• Emphysema\n• Nodule", ["Emphysema", "Nodule"]),
        ("(infection? atelectasis?) Next", ["(infection? atelectasis?) Next"]),
        ("\x00 \x07", []),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert list(sentences(text)) == expected

"""How people write and lay out reports: line ends, sections, the scope of denials, signs, letters."""

import json
import re
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mu2llm.config import JudgeConfig
from mu2llm.green import findings, labels, load_judge, sentences

JUDGE = load_judge(JudgeConfig(name="rules"))


def read(text: str) -> set[str]:
    return {label for label, value in labels(text).items() if value}


def score(reference: str, candidate: str) -> float | None:
    return JUDGE.judge([(reference, candidate)])[0].score


def test_what_others_reported(shared):
    lines = (shared / "data" / "text" / "sentences.jsonl").read_text(encoding="utf-8").split("\n")
    for case in map(json.loads, filter(None, lines)):
        expect = case["expect"]
        if case["kind"] == "green":
            assert score(case["reference"], case["candidate"]) == expect["score"], case
        else:
            found, present = read(case["text"]), set(expect["present"])
            assert present <= found, case
            assert found == present if expect["absent"] == "others" else not found & set(expect["absent"]), case


LAYOUTS = [
    ("no evidence of\nconsolidation", ""),
    ("There is a hiatal\r\nhernia.", "Hiatal hernia"),
    ("NO EVIDENCE OF\nCONSOLIDATION. MILD\nEMPHYSEMA.", "Emphysema"),
    ("Ground-\nglass opacity.", "Lung opacity"),
    ("effu\u00ad\nsion in the pleural space", "Pleural effusion"),
    ("No nodule is seen in the\nRLL. Emphysema", "Emphysema"),
    # one finding a line
    ("Emphysema\nNo nodule\nHiatal hernia", "Emphysema|Hiatal hernia"),
    ("emphysema\nno nodule\nhiatal hernia", "Emphysema|Hiatal hernia"),
    ("- emphysema\n- no nodule\n- hiatal hernia", "Emphysema|Hiatal hernia"),
    ("1) emphysema\n2) no nodule\n3) hiatal hernia", "Emphysema|Hiatal hernia"),
    ("lungs: no nodule\nheart: cardiomegaly\npleura: no effusion", "Cardiomegaly"),
    ("No effusion\n\nEmphysema", "Emphysema"),
    ("Impression:\nEmphysema\nNo nodule", "Emphysema"),
    # a heading above its text
    ("MEDIASTINUM:\n\nThere are two adjacent nodules.", ""),
    ("Liver:\n\nThere is a nodule.\n\nLungs:\n\nEmphysema.", "Emphysema"),
    ("No evidence of:\n\nNodule", ""),
    ("Heart:\n\nLungs: Emphysema", "Emphysema"),
]
TERMS = [
    ("Pericardial effusion without pleural effusion.", "Pericardial effusion"),
    ("Pleural fluid with no pericardial fluid.", "Pleural effusion"),
    ("Emphysema without bullae or nodule.", "Emphysema"),
    ("Thickening of the pleura without thickening of interlobular septa.", ""),
    ("The trachea is dilated and the left atrium is normal.", ""),
    ("The bronchi are dilated and the interlobular septa are not thickened.", "Bronchiectasis"),
]
CHANGES = [
    ("No significant increase in the pleural effusion.", "Pleural effusion"),
    ("No evidence of growth of the nodule.", "Lung nodule"),
    ("The nodule has not increased in size.", "Lung nodule"),
    ("The effusion hasn't resolved.", "Pleural effusion"),
    ("The consolidation did not resolve.", "Consolidation"),
    ("Partially resolved pleural effusion.", "Pleural effusion"),
    ("No resolution of the consolidation.", "Consolidation"),
    ("Unresolved consolidation.", "Consolidation"),
    ("Complete resolution of the consolidation.", ""),
    ("Interval clearing of the ground-glass opacities.", ""),
    ("Nodule no longer seen, resolved effusion.", ""),
    ("There is no longer a pleural effusion.", ""),
    ("Effusion has resolved and consolidation persists.", "Consolidation"),
    # what was never there does not change
    ("No increase in heart size.", ""),
    ("No enlargement of mediastinal lymph nodes.", ""),
    ("There was no increase in peribronchial wall thickness.", ""),
    ("There is no new nodule.", ""),
]
SCOPES = [
    ("No consolidation, moderate pleural effusion.", "Pleural effusion"),
    ("No pericardial effusion, bilateral pleural effusions.", "Pleural effusion"),
    ("No nodule, multiple enlarged lymph nodes.", "Lymphadenopathy"),
    ("No pneumonia, bronchiectasis is present.", "Bronchiectasis"),
    ("Pleural effusion absent, cardiomegaly present.", "Cardiomegaly"),
    ("Emphysema in the upper lobes, effusion was not observed.", "Emphysema"),
    ("Mild emphysema, pleural effusion and consolidation absent.", "Emphysema"),
    ("No acute disease: emphysema.", "Emphysema"),
    ("No active disease - chronic emphysema.", "Emphysema"),
    # lists go on
    ("No nodule, mass or consolidation.", ""),
    ("No nodule, mass, effusion.", ""),
    ("No pneumothorax, large mass or effusion.", ""),
    ("Consolidation, nodule and effusion were not seen.", ""),
    ("Nodule, consolidation or effusion is absent.", ""),
    ("No evidence of: nodule, effusion, consolidation.", ""),
    ("Negative for the following: nodule, effusion.", ""),
]
SECTIONS = [
    ("REASON FOR EXAM: evaluate pleural effusion.\nFINDINGS: Emphysema.", "Emphysema"),
    ("TECHNIQUE: CT through the catheter.\nFINDINGS: Clear.", ""),
    ("HISTORY\nPleural effusion.\nFINDINGS\nEmphysema.", "Emphysema"),
    ("Clinical History: nodule FINDINGS: Emphysema.", "Emphysema"),
    ("**HISTORY:** nodule\n\n**FINDINGS:** Emphysema.", "Emphysema"),
    ("COMPARISON: CT of 2019 with nodule. Earlier effusion.\nLungs: clear. Emphysema.", "Emphysema"),
    ("FINDINGS: Emphysema. COMPARISON: CT with nodule.", "Emphysema"),
    ("CLINICAL\nINFORMATION: nodule\nFINDINGS: Emphysema", "Emphysema"),
    # what has no heading of its own is not lost
    ("History: COPD. There is a nodule.", "Lung nodule"),
    ("Comparison: None.\n\nThere is a nodule.\n\nIMPRESSION: Nodule and emphysema.", "Lung nodule|Emphysema"),
]
SIGNS = [
    ("Pneumonia or consolidation unlikely.", ""),
    ("Unlikely to represent consolidation.", ""),
    ("The appearance is not consistent with emphysema.", ""),
    ("Not in keeping with consolidation.", ""),
    ("Atelectasis rather than consolidation.", "Atelectasis"),
    ("Emphysema (-), nodule (+)", "Lung nodule"),
    ("Bronchiectasis: - Emphysema: + Nodule: -", "Emphysema"),
    ("Bronchiectasis: –\nEmphysema: +", "Emphysema"),
    ("Emphysema: no\nNodule: yes", "Lung nodule"),
    ("[ ] Emphysema\n[x] Nodule", "Lung nodule"),
    ("- [ ] Emphysema\n- [x] Nodule", "Lung nodule"),
    ("[x] Emphysema [ ] Nodule", "Emphysema"),
    ("Emphysema [ ], nodule [x]", "Lung nodule"),
    ("☐ Emphysema\n☒ Nodule", "Lung nodule"),
    ("Hiatal hérnia", "Hiatal hernia"),
    ("Small pleural eﬀusion.", "Pleural effusion"),
    ("Small pleural effÃ¼sion.", "Pleural effusion"),
    ("Ground–glass opacities", "Lung opacity"),
    ("pleu\u00adral effu\u00adsion", "Pleural effusion"),
    ("\ufeffEmphysema.", "Emphysema"),
]


@pytest.mark.parametrize(("text", "expected"), LAYOUTS + TERMS + CHANGES + SCOPES + SECTIONS + SIGNS)
def test_labels(text, expected):
    assert read(text) == set(filter(None, expected.split("|"))), sentences(text)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ("Left upper lobe nodule.", "LUL nodule.", 1.0),
        ("Effusion on the right.", "Rt pleural effusion.", 1.0),
        ("A 12 x 8 mm nodule in the left lung.", "A nodule of 12 mm by 8 mm in the left lung.", 1.0),
        ("The consolidation has not cleared.", "The consolidation has cleared.", 0.0),
        ("LV dilated. Emphysema.", "LV dilated. Emphysema.", 1.0),
        ("la dilated. emphysema. hiatal hernia.", "la dilated. emphysema. hiatal hernia.", 1.0),
        ("Emphysema.", "\n", 0.0),
        ("Emphysema.", "Нет плеврального выпота.", 0.0),
    ],
)
def test_green(reference, candidate, expected):
    assert score(reference, candidate) == expected


def test_abbreviated_lobes_have_their_side():
    assert {(f.side, f.place) for f in findings("RLL consolidation. Nodule in the LUL.")} == {
        ("right", "lower lobe"),
        ("left", "upper lobe"),
    }


def test_a_section_that_speaks_elsewhere_is_one_sentence():
    text = "HISTORY: COPD. Smoker.\nFINDINGS: Emphysema. No nodule."
    assert sentences(text) == ("HISTORY: COPD. Smoker.", "Emphysema.", "No nodule.")
    assert not findings("HISTORY: Emphysema.")


SPACES = ["\n", "\r\n", " \n  ", "\r", "\x0b", "\x0c", "\x85", *map(chr, (0xA0, 0x1680, 0x202F, 0x205F, 0x3000))]
SPACES += [chr(code) for code in (*range(0x2000, 0x200C), 0x2028, 0x2029)]
STATEMENTS = [
    "No evidence of pneumothorax, pleural effusion, consolidation or lung nodule.",
    "There is a calcified plaque in the left anterior descending coronary artery.",
    "A 25 by 8 mm nodule in the right lower lobe.",
    "Small pericardial effusion, no pleural effusion, mild cardiomegaly.",
    "Interval resolution of the right pleural effusion.",
    "The consolidation is not fully resolved.",
    "Ground-glass opacities in both lungs, without interlobular septal thickening.",
    "Atherosclerotic changes in the aorta and coronary arteries.",
    "The heart is not enlarged.",
    "There is a hiatal hernia; emphysema is not seen.",
]
ABOUT_OTHERS = ["Clinical history:", "Comparison:", "Technique:", "Reason for exam:", "Indication:"]
ABOUT_THE_SCAN = ["Findings:", "Impression:", "Lungs:", "Mediastinum:", "Heart:"]


@st.composite
def reports(draw):
    """[(heading, statements)]: sections in an order in which those that speak of the scan come last."""
    first = draw(st.lists(st.sampled_from(ABOUT_OTHERS), max_size=2, unique=True))
    names = [*first, "Findings:", *draw(st.lists(st.sampled_from(ABOUT_THE_SCAN[1:]), max_size=2, unique=True))]
    statements = st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=3)
    return [(name, draw(statements)) for name in names]


def test_real_reports_in_any_width(shared):
    lines = (shared / "data" / "reports" / "ct_reports.jsonl").read_text(encoding="utf-8").split("\n")
    reports = [" ".join(row["text"].split()) for row in map(json.loads, filter(None, lines)) if row.get("labels")]
    for number, report in enumerate(reports[::20]):
        wrapped = textwrap.fill(report, 40 + number, break_long_words=False, break_on_hyphens=False)
        assert labels(wrapped) == labels(report), wrapped


def written(report, heading=str) -> str:
    return " ".join(f"{heading(name)} {' '.join(statements)}" for name, statements in report)


@given(reports(), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_line_end_and_any_space_is_a_space(report, data):
    text = written(report)
    count = text.count(" ")
    spaces = iter(data.draw(st.lists(st.sampled_from([" ", " ", *SPACES]), min_size=count, max_size=count)))
    other = re.sub(" ", lambda _: next(spaces), text)
    assert labels(other) == labels(text)
    assert findings(other) == findings(text)
    assert score(text, other) == score(text, text)


LAYS = [("", ""), ("\n", "\n"), ("\n\n", "\n\n"), ("\n\n", "\n"), ("\n", "")]


@given(reports(), st.sampled_from([str.upper, str.lower, str.title, str.swapcase]), st.sampled_from(LAYS))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_headings_in_any_case_and_place(report, case, lay):
    before, behind = lay
    text = written(report)
    other = written(report, lambda name: f"{before}{case(name)}{behind}").strip()
    assert labels(other) == labels(text)
    assert score(text, other) == score(text, text)

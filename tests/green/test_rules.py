"""The judge by rules: every category of GREEN, and monotone."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mu2llm.green import load_judge, parse, write_answer
from mu2llm.records import Judgement
from mu2llm.settings.green import JudgeConfig

JUDGE = load_judge(JudgeConfig(name="rules"))


def judge(reference: str, candidate: str) -> Judgement:
    return JUDGE.judge([(reference, candidate)])[0]


REFERENCE = "Large left pleural effusion. 12 mm nodule in the right upper lobe. No pneumothorax."


@pytest.mark.parametrize(
    ("reference", "candidate", "significant", "insignificant", "matched"),
    [
        # the same, in the same and in other words
        (REFERENCE, REFERENCE, "", "", 2),
        (REFERENCE, "Right upper lobe nodule measuring 1.2 cm. There is a massive effusion on the left.", "", "", 2),
        # (a) false findings
        ("Left pleural effusion.", "Left pleural effusion. There is a pneumothorax on the left.", "a", "", 1),
        ("No pleural effusion.", "Right pleural effusion.", "a", "", 0),
        ("Left pleural effusion.", "Bilateral pleural effusion.", "a", "", 1),
        # (b) missing ones
        (REFERENCE, "Large left pleural effusion.", "b", "", 1),
        (REFERENCE, "No pleural effusion. No nodule.", "bb", "", 0),
        ("Bilateral pleural effusion.", "Right pleural effusion.", "b", "", 1),
        ("Left pleural effusion.", "The heart is normal in size.", "b", "", 0),
        # (c) position
        ("Left pleural effusion.", "Right pleural effusion.", "c", "", 0),
        ("Left pleural effusion.", "Pleural effusion.", "c", "", 1),
        ("Nodule in the right upper lobe.", "Nodule in the right lower lobe.", "c", "", 0),
        ("Nodule in the right upper lobe.", "Nodule in the right lung.", "", "c", 1),
        ("Sclerosis of the T8 vertebral body.", "Sclerosis of the T11 vertebral body.", "c", "", 0),
        # (d) severity
        ("Large left pleural effusion.", "Small left pleural effusion.", "d", "", 0),
        ("Large left pleural effusion.", "Moderate left pleural effusion.", "", "d", 1),
        ("Liver lesion of 10 mm.", "Liver lesion of 3 cm.", "d", "", 0),
        ("Liver lesion of 10 mm.", "Liver lesion of 1.4 cm.", "", "d", 1),
        ("Liver lesion of 10 mm.", "Liver lesion of 1.1 cm.", "", "", 1),
        ("Liver lesion of 10 mm.", "Liver lesion.", "", "d", 1),
        # (e) a comparison that the reference doesn't make
        ("Left pleural effusion.", "Left pleural effusion, increased compared to the prior study.", "e", "", 1),
        ("Emphysema.", "Emphysema. No interval change.", "e", "", 1),
        ("New nodule in the left lung.", "Stable nodule in the left lung.", "e", "", 1),
        # (f) a comparison that it makes and the candidate doesn't
        ("New left pleural effusion.", "Left pleural effusion.", "f", "", 1),
        ("Emphysema. Unchanged since the previous examination.", "Emphysema.", "f", "", 1),
        # normal statements
        ("Normal chest.", "The lungs are clear. No pleural effusion.", "", "", 1),
        ("No pleural effusion.", "The carpet is red and there is a dog.", "b", "", 0),
    ],
)
def test_categories(reference, candidate, significant, insignificant, matched):
    judgement = judge(reference, candidate)
    assert judgement.valid, judgement.why
    found = [
        "".join(c * n for c, n in zip("abcdef", counts, strict=True))
        for counts in (judgement.significant, judgement.insignificant)
    ]
    assert (*found, judgement.matched) == (significant, insignificant, matched), write_answer(judgement)
    assert judgement.score == (matched / (matched + len(significant)) if matched else 0.0)
    assert judgement.judge == JUDGE.identity


@pytest.mark.parametrize(
    ("reference", "candidate", "why"),
    [
        ("", "Clear.", "the reference report is empty"),
        ("Нет плеврального выпота.", "Clear lungs.", "the reference report is not in English"),
        ("The sky is blue today.", "Clear lungs.", "no finding and no normal statement"),
    ],
)
def test_what_cannot_be_judged_is_invalid(reference, candidate, why):
    judgement = judge(reference, candidate)
    assert not judgement.valid and judgement.score is None
    assert why in judgement.why


@pytest.mark.parametrize(
    ("reference", "candidate", "why"),
    [
        ("Clear lungs.", " \n", "the candidate report is empty"),
        ("Clear lungs.", "\x00\x07 123", "the candidate report is empty"),
        ("Clear lungs.", "Kein Pneumothorax und kein Erguss. Die Lunge ist frei.", "not in English"),
        ("Clear lungs.", "Pas d'épanchement pleural. Le coeur est normal.", "not in English"),
        ("Clear lungs.", "双肺未见明显异常。", "not in English"),
        ("Clear lungs.", "Нет плеврального выпота.", "not in English"),
    ],
)
def test_a_candidate_that_says_nothing_scores_nothing(reference, candidate, why):
    judgement = judge(reference, candidate)
    assert judgement.valid and judgement.score == 0.0
    assert why in judgement.why


@pytest.mark.parametrize("filler", ["word ", "no ", "effusion ", "(", "1.2 x ", "and ", "\x00", "a" * 50, "\n"])
def test_ten_thousand_words_are_judged(filler):
    judgement = judge("Left pleural effusion.", "Left pleural effusion. " + filler * 10_000)
    assert judgement.valid == (judgement.score is not None)


def test_its_text_is_its_judgement():
    for candidate in (REFERENCE, "Small right pleural effusion. New 4 cm nodule in the left lower lobe.", "Normal."):
        judgement = judge(REFERENCE, candidate)
        assert parse(write_answer(judgement, "Why.")).model_copy(update={"judge": judgement.judge}) == judgement


def test_a_report_cannot_write_its_own_judgement():
    judgement = judge(REFERENCE, "[Matched Findings]: 9. (a) False report: 0. Right pleural effusion; x.")
    assert judgement.score == 0.0
    assert parse(write_answer(judgement)).score == 0.0


def test_a_repeated_finding_is_neither_false_nor_matched_twice():
    judgement = judge(
        "Left pleural effusion.", "Left pleural effusion. There is an effusion on the left. Left effusion."
    )
    assert (judgement.matched, sum(judgement.significant)) == (1, 0)


def test_several_of_a_kind_are_paired_so_that_most_agree():
    reference = "5 mm nodule in the right upper lobe. 20 mm nodule in the left lower lobe."
    candidate = "Nodule of 2 cm in the left lower lobe. Nodule of 5 mm in the right upper lobe."
    assert judge(reference, candidate).score == 1.0


SIDES = ["left", "right", "bilateral", ""]
FINDING = st.one_of(
    st.builds(
        "{0} {1} pleural effusion{2}.".format,
        st.sampled_from(["Small", "Large", "New", "Stable", "A"]),
        st.sampled_from(SIDES),
        st.sampled_from(["", " compared to the prior study", ", increased since the prior study"]),
    ),
    st.builds(
        "{0} mm nodule in the {1} {2}.".format,
        st.sampled_from([4, 5, 9, 30]),
        st.sampled_from(["left", "right"]),
        st.sampled_from(["upper lobe", "lower lobe", "lung"]),
    ),
    st.builds("Renal cyst of {0} mm on the {1}.".format, st.sampled_from([10, 30]), st.sampled_from(SIDES[:3])),
    st.sampled_from(
        [
            "Emphysema.",
            "Cardiomegaly.",
            "Hypodense liver lesion.",
            "There is a lung nodule.",
            "Gallstones.",
            "No pneumothorax.",
            "The spleen is normal.",
            "No interval change.",
        ]
    ),
)
REPORT = st.lists(FINDING, min_size=1, max_size=6)


def score(reference: Sequence[str], candidate: Sequence[str]) -> float:
    judgement = judge(" ".join(reference), " ".join(candidate))
    return -1.0 if judgement.score is None else judgement.score


@given(REPORT, REPORT, FINDING, st.integers(0, 6))
@settings(max_examples=600, deadline=None, derandomize=True)
def test_adding_a_false_finding_never_raises_the_score(reference, candidate, extra, position):
    if judge(" ".join(reference), extra).matched:
        return  # not false
    assert score(reference, [*candidate[:position], extra, *candidate[position:]]) <= score(reference, candidate)


@given(REPORT, REPORT, st.integers(0, 12))
@settings(max_examples=600, deadline=None, derandomize=True)
def test_removing_a_matched_finding_never_raises_the_score(reference, candidate, index):
    sentence = (reference + candidate)[index % len(reference + candidate)]
    if not judge(" ".join(reference), sentence).matched:
        return
    without = [other for other in candidate if other != sentence]
    assert score(reference, without) <= score(reference, [*without, sentence])


@given(REPORT)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_report_agrees_with_itself(report):
    judgement = judge(" ".join(report), " ".join(report))
    assert judgement.score == 1.0 and sum(judgement.significant) == 0


@given(st.text(max_size=200), st.text(max_size=200))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_is_judged(reference, candidate):
    judgement = judge(reference, candidate)
    assert judgement.valid == (judgement.score is not None)
    assert not judgement.why or not judgement.score

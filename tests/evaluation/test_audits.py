"""A model that reads the scan passes; one that writes what reports usually say does not."""

import numpy as np
import pytest
from small_runs import SIDES

from mu2llm.evaluation.audits import Contrast, _of_the_table, audit
from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.evaluation.scoring import CUT_OFF, Texts, judge_finished, judged
from mu2llm.green import load_judge
from mu2llm.records import Case, Estimate, Finding, Judgement
from mu2llm.settings.green import JudgeConfig

RULES = load_judge(JudgeConfig())
NORMAL = "No pleural effusion. The liver is normal."


def make_case(i, kind):
    side = SIDES[i % 2]
    present = kind % 2 == 0
    text = f"There is a {side} pleural effusion." if present else "No pleural effusion."
    lesion = kind % 3 == 0
    text += " Hypodense liver lesion." if lesion else " The liver is normal."
    findings = [Finding(name="pleural effusion", side=side)] if present else []
    findings += [Finding(name="liver lesion")] if lesion else []
    return Case(id=f"c{i}", patient=f"p{i}", volume="", report=text, findings=tuple(findings))


CASES = tuple(make_case(i, int(k)) for i, k in enumerate(np.random.default_rng(0).integers(0, 6, 60)))
REFERENCES = tuple(case.report for case in CASES)


def texts(candidates, cases=CASES):
    return Texts(cases, tuple(case.report for case in cases), tuple(candidates))


def shifted(by):
    return [REFERENCES[(i + by) % len(REFERENCES)] for i in range(len(REFERENCES))]


def run(candidates, shuffled, prior=NORMAL, **changes):
    own = texts(candidates)
    judgements = changes.pop("judgements", RULES.judge(own.pairs))
    variants = {
        "shuffled": texts(shuffled),
        "zeroed": texts([NORMAL] * len(CASES)),
        "prior": texts([prior] * len(CASES)),
        **changes.pop("variants", {}),
    }
    return audit(own, variants, judgements, changes.pop("finished", [True] * len(CASES)), RULES, resamples=200)


def test_a_model_that_looks_passes():
    result = run(REFERENCES, shifted(7))
    assert result.passed and not result.red_line and not result.reasons
    assert result.contrasts["shuffled"]["finding_f1"].gain.low > 0
    assert result.laterality.value == 1
    assert result.overlooked.value == 0
    assert 0 < result.distinct_reports < 1


def test_a_model_that_writes_any_report_gets_the_red_line():
    result = run(shifted(7), shifted(13))
    assert not result.passed
    assert any("other patients' scans" in reason for reason in result.reasons)
    assert result.red_line.startswith("does not look at the scan: finding_f1 0.")


def test_a_template_is_called_one():
    result = run([NORMAL] * len(CASES), [NORMAL] * len(CASES))
    assert any("one text is 100%" in reason for reason in result.reasons)
    assert any("as one fixed report" in reason for reason in result.reasons)
    assert result.most_frequent_report == NORMAL
    assert result.distinct_reports == pytest.approx(1 / len(CASES))
    assert result.overlooked.value == 1


def test_sides_swapped_show_as_laterality():
    swapped = [text.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right") for text in REFERENCES]
    result = run(swapped, shifted(7))
    assert result.laterality.value == 0
    assert result.laterality.n == sum(any(f.side for f in case.findings) for case in CASES)


def test_invalid_cut_off_and_empty_are_said():
    candidates = [*REFERENCES[:59], ""]
    judgements = [Judgement(valid=False, score=None, why="refused")] * 3 + RULES.judge(texts(candidates).pairs)[3:]
    result = run(candidates, shifted(7), judgements=judgements, finished=[False] * 6 + [True] * 54)
    assert result.invalid == {"refused": 3}
    assert result.cut_off == pytest.approx(0.1)
    told = " | ".join(result.warnings)
    assert "3 of 60 judgements are invalid" in told and "6 of 60 reports were cut off" in told
    assert "1 of 60 reports cannot be judged and score 0" in told
    assert not result.shortfalls and sum(result.failed.values()) == 1


def test_a_mean_over_less_than_95_of_100_cases_is_no_score():
    judgements = [Judgement(valid=False, score=None, why="refused")] * 4 + RULES.judge(texts(REFERENCES).pairs)[4:]
    result = run(REFERENCES, shifted(7), judgements=judgements)
    assert not result.passed and result.reasons == []
    assert result.red_line.startswith(
        "GREEN is a mean over 56 of 60 cases only: the judge failed on the others, 4: ref"
    )


def test_one_right_report_and_four_empty_ones_are_a_fifth():
    """They were invalid, and GREEN was 1.0 at n 1."""
    pairs = [
        ("Left pleural effusion.", text) for text in ("Left pleural effusion.", "", "-", "qwe rty", "Kein Erguss.")
    ]
    cut = judge_finished(RULES, [pairs[0], *pairs], [False] + [True] * 5)
    assert cut[0].failed and cut[0].score == 0 and cut[0].why == CUT_OFF and not cut[1].failed
    assert [judgement.failed for judgement in cut[2:]] == [True] * 4
    assert judged(cut[1:]).n == 5 and Bootstrap(range(5)).estimate(judged(cut[1:])).value == pytest.approx(0.2)


def test_without_another_patient_there_is_no_verdict_to_pass():
    nobody = Texts((), (), ())
    result = run(REFERENCES, shifted(7), variants={"shuffled": nobody})
    assert not result.passed and "not measurable with other patients' scans" in result.reasons[0]


def test_variants_of_some_cases_are_compared_on_these():
    some = Texts(CASES[:30], REFERENCES[:30], tuple(shifted(7)[:30]))
    contrast = run(REFERENCES, shifted(7), variants={"shuffled": some}).contrasts["shuffled"]["finding_f1"]
    assert contrast.without.n == contrast.gain.n == 30


def test_words_that_add_nothing_to_a_table_are_said_to_but_get_no_red_line():
    result = run(REFERENCES, shifted(7), variants={"table": texts(REFERENCES)})
    assert result.passed and result.contrasts["table"]["green_rules"].gain.value == 0
    assert any(line.startswith("its wording adds nothing to a table") for line in result.warnings)
    better = run(REFERENCES, shifted(7), variants={"table": texts([NORMAL] * len(CASES))})
    assert not any("table" in line for line in better.warnings)


def test_words_that_add_a_little_to_a_table_are_not_said_to_add_nothing():
    without, gain = Estimate(value=0.68, low=0.62, high=0.74, n=200), Estimate(value=0.04, low=0.01, high=0.08, n=200)
    [line] = _of_the_table({"table": {"green_rules": Contrast(without=without, gain=gain)}})
    assert line.startswith("its wording adds little to a table") and line.endswith("gain +0.01 … +0.08")


def parted(findings, impression):
    return f"Findings: {findings} Impression: {impression}"


def test_reports_that_contradict_themselves_are_counted_and_named():
    cases = tuple(case.model_copy(update={"report": parted(case.report, case.report)}) for case in CASES)
    wrong = [parted("No pneumothorax.", "Left pneumothorax.") if i < 15 else c.report for i, c in enumerate(cases)]
    result = audit(
        texts(wrong, cases), {}, RULES.judge(texts(wrong, cases).pairs), [True] * len(cases), RULES, resamples=200
    )
    own, reference = result.consistency, result.reference_consistency
    assert own.contradicted.value == own.unsupported.value == pytest.approx(15 / 60)
    assert (own.contradicted.n, own.omitted.value, own.whole, reference.contradicted.value) == (60, 0, 0, 0)
    assert own.examples[0] == "c0: left pneumothorax: the findings deny it"
    assert any("contradict each other in 25.0% of 60 reports (references: 0.0%)" in line for line in result.warnings)


def test_reports_of_one_part_are_not_counted_as_consistent():
    result = run(REFERENCES, shifted(7))
    assert result.consistency.contradicted is None and result.consistency.whole == 60
    assert not any("contradict" in line for line in result.warnings)

"""Pairs by rule: margin, ties, invalid judgements, lengths; corrupted references."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mu2llm.green import findings
from mu2llm.records import Candidate, Case, Judgement
from mu2llm.settings.stages import PreferencesConfig
from mu2llm.stages.corruption import corrupt
from mu2llm.stages.pairs import make_pairs, screen
from mu2llm.stages.rewards import Judged


def judged(scores, texts=None):
    items = []
    for index, score in enumerate(scores):
        text = texts[index] if texts else f"report number {index} of this case"
        candidate = Candidate(case_id="a", index=index, text=text, origin="sampled", seed=0)
        items.append(Judged(candidate, Judgement(valid=score is not None, score=score, judge="j"), score))
    return items


def test_best_against_worst():
    pairs, _ = make_pairs("write", judged([0.2, 0.9, None, 0.5]), PreferencesConfig(margin=0.1))
    assert [(pair.chosen_score, pair.rejected_score) for pair in pairs] == [(0.9, 0.2)]


def test_several_pairs_go_inwards_and_use_no_candidate_twice():
    pairs, _ = make_pairs("write", judged([0.0, 0.3, 0.6, 1.0]), PreferencesConfig(pairs_per_case=3, margin=0.2))
    assert [(pair.chosen_score, pair.rejected_score) for pair in pairs] == [(1.0, 0.0), (0.6, 0.3)]


def test_ties_small_margins_and_invalid_judgements_are_counted():
    assert make_pairs("write", judged([0.5, 0.5]), PreferencesConfig(margin=0))[1]["tie"] == 1
    assert make_pairs("write", judged([0.5, 0.55]), PreferencesConfig(margin=0.1))[1]["margin"] == 1
    pairs, dropped = make_pairs("write", judged([None, 0.5]), PreferencesConfig())
    assert not pairs
    assert (dropped["invalid_judgement"], dropped["too_few_candidates"]) == (1, 1)


def test_length_control():
    items = judged([0.1, 0.9], ["one two three four five", "one"])
    assert make_pairs("write", items, PreferencesConfig(max_length_ratio=2))[1]["length"] == 1
    assert len(make_pairs("write", items, PreferencesConfig(max_length_ratio=5))[0]) == 1


@settings(deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12), st.floats(0, 1), st.integers(1, 5))
def test_every_pair_keeps_the_margin(scores, margin, most):
    pairs, _ = make_pairs("write", judged(scores), PreferencesConfig(margin=margin, pairs_per_case=most))
    assert len(pairs) <= most
    for pair in pairs:
        assert pair.chosen_score > pair.rejected_score
        assert pair.chosen_score - pair.rejected_score >= margin


def test_screening_drops_short_texts_and_repetitions():
    texts = ["one two three", "one  two three", "one", "four five six"]
    candidates = [Candidate(case_id="a", index=i, text=t, origin="sampled", seed=0) for i, t in enumerate(texts)]
    kept, dropped = screen(candidates, min_words=2)
    assert [candidate.index for candidate in kept] == [0, 3]
    assert dropped == {"too_short": 1, "duplicate": 1}


def test_corruptions_are_the_errors_that_they_say():
    report = "There is a large left pleural effusion. The heart is normal. Impression: Left pleural effusion."
    case = Case(id="a", patient="p", volume="v", report=report)
    made = {c.corruption: c.text for c in corrupt(case, ["There is a cyst in the right kidney."], 5, seed=1)}
    assert {f.side for f in findings(made["swapped_side"])} == {"right"}
    assert findings(made["dropped_finding"]) == []
    assert {f.name for f in findings(made["invented_finding"])} == {"pleural effusion", "renal cyst"}


def test_a_normal_report_has_nothing_to_swap_or_to_drop():
    case = Case(id="a", patient="p", volume="v", report="No pleural effusion. No nodule is seen.")
    assert corrupt(case, ["No nodule."], 0, seed=1) == []

"""Rewards by name and composed: what they measure, that a sum is of z-scores within a case, and what is refused."""

import pytest
from pydantic import ValidationError

from mu2llm.records import Candidate, Judgement
from mu2llm.settings.reward import reward_terms
from mu2llm.settings.stages import PreferencesConfig
from mu2llm.stages.rewards import rewarded

REFERENCE = "Findings: There is a left pleural effusion. The heart is normal. Impression: Left pleural effusion."
OTHER_SIDE = REFERENCE.replace("left", "right").replace("Left", "Right")
NOTHING = "Findings: No pleural effusion. The heart is normal."


def judged(texts, scores):
    items = []
    for index, (text, score) in enumerate(zip(texts, scores, strict=True)):
        candidate = Candidate(case_id="a", index=index, text=text, origin="sampled", seed=0)
        items.append((candidate, Judgement(valid=score is not None, score=score, judge="j")))
    return items


def rewards(reward, texts, scores):
    return [item.reward for item in rewarded(reward_terms(reward), REFERENCE, judged(texts, scores))]


def test_each_reward_measures_what_it_says():
    texts, scores = [REFERENCE, OTHER_SIDE, NOTHING], [1.0, 0.3, 0.2]
    assert rewards("green", texts, scores) == scores
    assert rewards("findings", texts, scores) == [1, 0, 0]
    assert rewards("labels", texts, scores) == [1, 1, 0]
    assert rewards("format", texts, scores) == [1, 1, 0]
    assert rewards("-1*length", texts, scores) == [-len(text.split()) for text in texts]


def test_a_sum_is_of_scores_standardised_within_the_case():
    texts = ["one two three four", "one two"]
    assert rewards("green-0.5*length", texts, [0.9, 0.1]) == pytest.approx([0.5, -0.5])
    assert rewards("green-2*length", texts, [0.9, 0.1]) == pytest.approx([-1, 1])
    assert rewards("green+length", ["one two"] * 2, [0.9, 0.1]) == pytest.approx([1, -1])  # no spread adds nothing


def test_what_the_judge_failed_on_has_no_reward_and_is_not_counted():
    low, none, high = rewards("green+format", [REFERENCE, OTHER_SIDE, REFERENCE], [0.4, None, 0.8])
    assert (low, none, high) == (pytest.approx(-1), None, pytest.approx(1))


@pytest.mark.parametrize("reward", ["grene", "green+green", "green green", "0*green", "green+", "", "2green"])
def test_a_reward_that_means_nothing_is_refused_by_name(reward):
    with pytest.raises(ValidationError, match="reward"):
        PreferencesConfig(reward=reward)


def test_weights_are_read_with_their_signs():
    expected = {"green": 1.0, "labels": 0.5, "length": -0.1}
    assert reward_terms("green+0.5*labels-0.1*length") == reward_terms(" green + .5 * labels - 0.1*length ") == expected

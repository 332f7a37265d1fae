"""What is measured on held-out cases while a stage trains; that it is, is in tests/sweeps."""

import pytest
import torch

from mu2llm import config
from mu2llm.engine.log_probabilities import divergences
from mu2llm.green import load_judge
from mu2llm.model import build
from mu2llm.records import Case
from mu2llm.settings.green import JudgeConfig
from mu2llm.stages.validation import statistics

REPORTS = ["Findings: There is a large left pleural effusion.", "Findings: The liver is normal."]


@pytest.fixture(scope="module")
def given():
    """Two models of one shape, and what both read: an answer of each length."""
    experiment = config.load("tiny")
    models = [build(experiment.model, experiment.data.spec, REPORTS, seed) for seed in (0, 1)]
    (ours, processor), (theirs, _) = models
    batch = processor.encode(["What is there?"] * 2, REPORTS)
    scans = torch.zeros(2, *experiment.data.spec.shape, dtype=torch.uint8)
    features = ours.eval().encode_vision(scans)
    inputs = {**batch, "vision_features": features, "chunk_mask": torch.ones(2, experiment.data.spec.chunks).bool()}
    return ours, theirs.eval(), inputs


def test_a_policy_is_no_way_from_itself(given):
    ours, _, inputs = given
    total, tokens = divergences(ours, ours, inputs)
    assert total == pytest.approx(0, abs=1e-5)
    assert tokens == int((inputs["labels"] != -100).sum())


def test_divergence_is_that_of_the_distributions_at_every_token_of_the_answers(given):
    ours, theirs, inputs = given
    total, tokens = divergences(ours, theirs, inputs)
    shared = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=each(**shared).logits) for each in (ours, theirs))
    each = torch.distributions.kl_divergence(p, q)[:, :-1]
    assert total == pytest.approx(float(each[inputs["labels"][:, 1:] != -100].sum()), rel=1e-4)
    assert total / tokens > 0


def test_a_report_that_cannot_be_judged_counts_as_nothing():
    cases = [Case(id=str(i), patient=str(i), volume="", report=report) for i, report in enumerate(REPORTS)]
    green = statistics(cases, [REPORTS[0], ""], load_judge(JudgeConfig()))["green"]
    assert green.rows.tolist() == [[1.0, 1.0], [0.0, 1.0]]

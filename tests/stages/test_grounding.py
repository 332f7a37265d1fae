"""The grounding gap: of which tokens, with whose scan, and that it is 0 for who does not look."""

import pytest
import torch

from mu2llm import config
from mu2llm.engine.log_probabilities import answer_logps
from mu2llm.model import build
from mu2llm.records import Case
from mu2llm.stages.grounding import Gap, exchanged, stating

REPORTS = [
    "Findings: No pneumothorax. There is a 2.5 cm cyst in the left kidney. Impression: Left renal cyst.",
    "Findings: The liver is normal. Impression: No acute abnormality.",
    "Findings: Large right pleural effusion. The spleen is normal in size.",
]


@pytest.fixture(scope="module")
def given():
    experiment = config.load("tiny")
    model, processor = build(experiment.model, experiment.data.spec, REPORTS, 0)
    shape = experiment.data.spec.shape
    scans = torch.randint(0, 255, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = processor.encode(["What is there?"] * 3, REPORTS)
    labels = inputs.pop("labels")
    return model.eval(), processor, inputs, labels, model.encode_vision(scans).detach()


def test_tokens_of_sentences_with_findings_count_and_no_others(given):
    _, processor, _, labels, _ = given
    marked = stating(processor, REPORTS, labels)
    said = [processor.tokenizer.decode(labels[row, 1:][marked[row]]).strip() for row in range(3)]
    assert said == [
        "There is a 2.5 cm cyst in the left kidney. Left renal cyst.",
        "",
        "Large right pleural effusion.",
    ]
    assert marked.shape == (3, labels.shape[1] - 1)


def test_the_other_scan_is_of_another_patient_or_does_not_count():
    cases = [Case(id=name, patient=patient, volume="", report="") for name, patient in ("1a", "2a", "3b", "4c")]
    rows, other = exchanged(cases)
    assert rows == [1, 2, 3, 0]
    assert other.squeeze(1).tolist() == [False, True, True, True]
    assert not exchanged(cases[:1])[1].any()


def test_the_gap_is_what_the_own_scan_adds_to_each_token(given):
    model, processor, inputs, labels, features = given
    mask = torch.ones(features.shape[:2]).bool()
    count = stating(processor, REPORTS, labels)
    cases = [Case(id=str(i), patient=str(i), volume="", report=report) for i, report in enumerate(REPORTS)]
    own = answer_logps(model, inputs, labels, features, mask)
    loss = model(**inputs, labels=labels, vision_features=features, chunk_mask=mask).loss
    assert -float(own.sum()) / int((labels[:, 1:] != -100).sum()) == pytest.approx(float(loss), abs=1e-5)
    other = answer_logps(model, inputs, labels, features.roll(-1, 0), mask)
    gap = Gap(processor, "What is there?", "fp32")
    assert gap.mean is None
    nats, tokens = gap.add(model, cases, features, mask)
    assert nats == pytest.approx(float(own.sum())) and tokens == int((labels[:, 1:] != -100).sum())
    assert gap.mean == pytest.approx(float(own[count].mean() - other[count].mean()), abs=1e-6)
    assert gap.mean != 0
    blind = Gap(processor, "What is there?", "fp32")
    blind.add(model, cases, features[:1].expand_as(features), mask)
    assert blind.mean == 0

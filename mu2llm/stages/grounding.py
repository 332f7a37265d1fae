"""Grounding gap: how much likelier a report's findings are with the patient's own scan than with another's.

It needs two forward passes and no generation, and tells that a model begins to look at the scan long before the finding
F1 of its reports does (issue 19).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mu2llm import green
from mu2llm.engine.log_probabilities import answer_logps
from mu2llm.model import Mu2ForConditionalGeneration, Mu2Processor
from mu2llm.model.head import IGNORED
from mu2llm.records import Case
from mu2llm.settings.inference import Precision
from mu2llm.stages.lengths import shortened


@dataclass
class Gap:
    """Sums over the tokens of sentences that state findings, of cases beside which there was another patient's scan."""

    processor: Mu2Processor
    question: str
    precision: Precision
    nats: float = 0.0
    tokens: int = 0

    def add(
        self, model: Mu2ForConditionalGeneration, cases: list[Case], features: Tensor, mask: Tensor
    ) -> tuple[float, int]:
        """Cases with their features (R, T, n, E) and chunk mask (R, T), each also with the next one's scan → the sum of
        their reports' log-probabilities in nats, and how many tokens that is of; longer ones than fit are cut."""
        texts = [shortened(self.processor, self.question, case.report) for case in cases]
        inputs = self.processor.encode([self.question] * len(cases), texts)
        labels = inputs.pop("labels")
        rows, foreign = exchanged(cases)
        own, other = (answer_logps(model, inputs, labels, features[of], mask[of], self.precision) for of in (..., rows))
        counted = stating(self.processor, texts, labels) & foreign
        self.nats += float(((own - other) * counted).sum())
        self.tokens += int(counted.sum())
        return float(own.sum()), int((labels[:, 1:] != IGNORED).sum())

    @property
    def mean(self) -> float | None:
        """Nats a token; None where no token counted."""
        return self.nats / self.tokens if self.tokens else None


def exchanged(cases: list[Case]) -> tuple[list[int], Tensor]:
    """For each case the row of the next one, and whether that is another patient's, (R, 1)."""
    rows = [(row + 1) % len(cases) for row in range(len(cases))]
    other = [cases[row].patient != case.patient for row, case in zip(rows, cases, strict=True)]
    return rows, torch.tensor(other)[:, None]


def stating(processor: Mu2Processor, reports: list[str], labels: Tensor) -> Tensor:
    """(R, L − 1): which next tokens of `labels` (R, L) belong to a sentence in which the rules read a finding."""
    marked = torch.zeros(labels.shape, dtype=torch.bool)
    for row, report in enumerate(reports):
        offsets = processor.tokenizer(
            report, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )["offset_mapping"]
        spans = _spans(report)
        said = [any(start < end and begin < to for begin, end in spans) for start, to in offsets]
        answer = (labels[row] != IGNORED).nonzero().squeeze(1)[: len(said)]
        marked[row, answer] = torch.tensor(said[: len(answer)])
    return marked[:, 1:]


def _spans(report: str) -> list[tuple[int, int]]:
    """Where in the report its sentences with findings are; one that is not there word for word is left out."""
    found, after = [], 0
    for sentence in green.sentences(report):
        start = report.find(sentence, after)
        if start < 0:
            continue
        after = start + len(sentence)
        if green.findings(sentence):
            found.append((start, after))
    return found

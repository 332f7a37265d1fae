"""What reports say, as texts to hold scans against, and the embeddings of these texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from mu2llm import weights
from mu2llm.errors import UserError
from mu2llm.green import findings, sentences


class TextBank:
    """The positives of reports and their embeddings, each distinct text embedded once, whitened.

    All reports speak of the same anatomy: as they come, embeddings of "left" and "right" are nearly one vector.
    Where the training reports have few distinct positives (findings), all of them are compared with every scan.
    """

    MOST_COMPONENTS, MOST_COMPARED, SAMPLE = 128, 256, 2048

    def __init__(self, encoder: weights.TextEncoder, positives: str, reports: list[str], seed: int) -> None:
        self.encoder, self.positives = encoder, positives
        distinct = sorted({text for report in reports for text in self.split(report)})
        if not distinct:
            raise UserError(f"no report has a {positives}: choose other contrastive.positives")
        self.compared = distinct if len(distinct) <= self.MOST_COMPARED else []
        rng = np.random.default_rng(seed)
        sample = [distinct[i] for i in sorted(rng.permutation(len(distinct))[: self.SAMPLE])]
        embedded = np.asarray(encoder.embed(sample), dtype=np.float32)
        self.centre = embedded.mean(axis=0)
        _, spread, axes = np.linalg.svd(embedded - self.centre, full_matrices=False)
        self.width = max(1, min(self.MOST_COMPONENTS, len(sample) - 1))
        kept = np.maximum(spread[: self.width], 1e-4)
        self.whiten = axes[: self.width].T / kept * np.sqrt(len(sample) / self.width)
        self.known = dict(zip(sample, self._whitened(embedded), strict=True))

    def split(self, report: str) -> list[str]:
        """The positives of a report: itself, its sections, its sentences, or its findings, each once."""
        if self.positives == "report":
            return [report]
        if self.positives == "section":
            parts = re.split(r"(?i)\b(?=(?:findings|impression)\s*:)", report)
            return [part.strip() for part in parts if part.strip()]
        if self.positives == "finding":
            return list(dict.fromkeys(f"{f.side or ''} {f.name}".strip() for f in findings(report)))
        return list(dict.fromkeys(sentences(report)))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(M, width) float32"""
        new = sorted(set(texts) - self.known.keys())
        if new:
            embedded = np.asarray(self.encoder.embed(new), dtype=np.float32)
            self.known.update(zip(new, self._whitened(embedded), strict=True))
        return np.stack([self.known[text] for text in texts])

    def _whitened(self, embedded: np.ndarray) -> np.ndarray:
        return ((embedded - self.centre) @ self.whiten).astype(np.float32)

    def targets(self, reports: Sequence[str]) -> dict[str, torch.Tensor]:
        """`text_embeddings` (M, width) and `targets` (M, B): which report has which text."""
        parts = [set(self.split(report)) for report in reports]
        distinct = self.compared or sorted(set().union(*parts))
        has = np.array([[text in part for part in parts] for text in distinct], dtype=bool)
        return {"text_embeddings": torch.as_tensor(self(distinct)), "targets": torch.as_tensor(has)}

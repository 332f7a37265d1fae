"""What reports say, as texts to hold scans against: embedded once by a frozen encoder, or tokens for a trained one."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mu2llm import weights
from mu2llm.errors import UserError
from mu2llm.green import findings, sentences
from mu2llm.settings.stages import FINDINGS


def findings_of(report: str, positives: str = "finding") -> list[str]:
    """What the rules read in a report, each finding once, with its side; of placed findings also with their place:
    right lung nodule, right upper lobe lung nodule."""
    told: list[str] = []
    for each in findings(report):
        told.append(_joined(each.side, each.name))
        if each.place and positives == "placed_finding":
            told.append(_joined(each.side, each.place, each.name))
    return list(dict.fromkeys(told))


def _joined(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)


def most_frequent(reports: Sequence[str], count: int, positives: str = "finding") -> list[str]:
    """The findings that most of the reports have, sorted by name; a UserError where there are fewer than `count`."""
    reported = Counter(finding for report in reports for finding in findings_of(report, positives))
    if len(reported) < count:
        raise UserError(
            f"model.tokenizer.prior={count}: the training reports have {len(reported)} different findings; set "
            f"{len(reported)} or fewer"
        )
    return sorted(sorted(reported, key=lambda finding: (-reported[finding], finding))[:count])


class Positives:
    """The positives of reports.

    Where the training reports have few distinct positives (findings), all of them are compared with every scan.
    """

    MOST_COMPARED = 256
    width: int

    def __init__(self, encoder: weights.TextEncoder, positives: str, reports: Sequence[str]) -> None:
        self.encoder, self.positives = encoder, positives
        self.distinct = sorted({text for report in reports for text in self.split(report)})
        if not self.distinct:
            raise UserError(f"no report has a {positives}: choose other contrastive.positives")
        self._keys: dict[str, int] = {}
        self.compared = self.distinct if len(self.distinct) <= self.MOST_COMPARED else []

    def split(self, report: str) -> list[str]:
        """The positives of a report: itself, its sections, its sentences, or its findings, each once."""
        if self.positives == "report":
            return [report]
        if self.positives == "section":
            parts = re.split(r"(?i)\b(?=(?:findings|impression)\s*:)", report)
            return [part.strip() for part in parts if part.strip()]
        if self.positives in FINDINGS:
            return findings_of(report, self.positives)
        return list(dict.fromkeys(sentences(report)))

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The model's inputs for texts (M)."""
        raise NotImplementedError

    def targets(self, reports: Sequence[str]) -> dict[str, Tensor]:
        """The inputs of the reports' texts, `text_keys` (M), and `targets` (M, B): which report has which text."""
        parts = [set(self.split(report)) for report in reports]
        distinct = self.compared or sorted(set().union(*parts))
        has = np.array([[text in part for part in parts] for text in distinct], dtype=bool)
        return {**self.inputs(distinct), "text_keys": self.keys(distinct), "targets": torch.as_tensor(has)}

    def keys(self, texts: Sequence[str]) -> Tensor:
        """(M,) int64: equal for texts that the encoder reads as the same tokens, on any worker."""
        return torch.tensor([self._key(text) for text in texts], dtype=torch.int64)

    def _key(self, text: str) -> int:
        if text not in self._keys:
            tokens = self.encoder.tokenizer(text, truncation=True, max_length=self.encoder.max_tokens)["input_ids"]
            self._keys[text] = int(hashlib.sha256(repr(list(tokens)).encode()).hexdigest()[:15], 16)
        return self._keys[text]


class TextBank(Positives):
    """With the embeddings of a frozen encoder, each distinct text embedded once, whitened.

    All reports speak of the same anatomy: as they come, embeddings of "left" and "right" are nearly one vector.
    """

    MOST_COMPONENTS, SAMPLE = 128, 2048

    def __init__(self, encoder: weights.TextEncoder, positives: str, reports: Sequence[str], seed: int) -> None:
        super().__init__(encoder, positives, reports)
        rng = np.random.default_rng(seed)
        sample = [self.distinct[i] for i in sorted(rng.permutation(len(self.distinct))[: self.SAMPLE])]
        embedded = np.asarray(encoder.embed(sample), dtype=np.float32)
        self.centre = embedded.mean(axis=0)
        _, spread, axes = np.linalg.svd(embedded - self.centre, full_matrices=False)
        self.width = max(1, min(self.MOST_COMPONENTS, len(sample) - 1))
        kept = np.maximum(spread[: self.width], 1e-4)
        self.whiten = axes[: self.width].T / kept * np.sqrt(len(sample) / self.width)
        self.known = dict(zip(sample, self._whitened(embedded), strict=True))

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`text_embeddings` (M, width) float32"""
        new = sorted(set(texts) - self.known.keys())
        if new:
            embedded = np.asarray(self.encoder.embed(new), dtype=np.float32)
            self.known.update(zip(new, self._whitened(embedded), strict=True))
        return {"text_embeddings": torch.as_tensor(np.stack([self.known[text] for text in texts]))}

    def _whitened(self, embedded: np.ndarray) -> np.ndarray:
        return ((embedded - self.centre) @ self.whiten).astype(np.float32)


class TextTokens(Positives):
    """As tokens, for a text encoder that is trained with the scans' side."""

    def __init__(self, encoder: weights.TextEncoder, positives: str, reports: Sequence[str]) -> None:
        super().__init__(encoder, positives, reports)
        self.width = encoder.width

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`text_ids` and `text_mask` (M, L)"""
        tokens = self.encoder.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.encoder.max_tokens, return_tensors="pt"
        )
        return {"text_ids": tokens["input_ids"], "text_mask": tokens["attention_mask"]}

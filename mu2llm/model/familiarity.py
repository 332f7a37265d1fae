"""How unlike the training scans a scan is, by the features that the model computes of it anyway.

A model writes as fluently of a scan that it knows nothing of. So a checkpoint keeps the mean and the covariance of the
training scans' pooled vision features, and how far each of these scans is from the others: Mahalanobis distance (Lee et
al. 2018, arXiv 1807.03888, with one class), the covariance shrunk as by Ledoit and Wolf (2004). A scan's percentile is
the share of the training scans that are nearer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from mu2llm import storage

FILE = "familiarity.safetensors"
UNLIKE = 99.5
"""Beyond this percentile a scan is called unlike the training scans."""
FOLDS = 4
LEAST = 50
"""Training scans without which there are no statistics: the tail of so few tells nothing."""


@dataclass(frozen=True)
class Familiarity:
    """`mean` (E) and `precision` (E, E) of pooled features, and the sorted `distances` (n) of training scans, each from
    statistics of which it was no part."""

    mean: Tensor
    precision: Tensor
    distances: Tensor

    @classmethod
    def of(cls, pooled: Tensor) -> Self | None:
        """Of training scans' pooled features (n, E); None where they are too few."""
        if len(pooled) < LEAST:
            return None
        fold = torch.arange(len(pooled)) % FOLDS
        held_out = [_distances(pooled[fold == k], *_statistics(pooled[fold != k])) for k in range(FOLDS)]
        return cls(*_statistics(pooled), torch.cat(held_out).sort().values)

    def percentiles(self, pooled: Tensor) -> list[float]:
        """Of scans' pooled features (B, E): 0 … 100, 100 being farther than every training scan."""
        distances = _distances(pooled.cpu(), self.mean, self.precision)
        nearer = torch.searchsorted(self.distances, distances)
        return [round(100 * float(each) / len(self.distances), 2) for each in nearer]

    def write(self, folder: str) -> None:
        """Into a checkpoint folder, local or not."""
        storage.write_bytes(storage.join(folder, FILE), save({name: x.contiguous() for name, x in vars(self).items()}))

    @classmethod
    def read(cls, uri: str) -> Self | None:
        """Of the checkpoint at a URI; None where it keeps none, as older ones do."""
        path = storage.join(uri, FILE)
        return cls(**load(storage.read_bytes(path))) if storage.exists(path) else None


def pooled(features: Tensor, chunk_mask: Tensor) -> Tensor:
    """(B, T, n, E) vision features and (B, T) → (B, E): their mean over the chunks that hold something."""
    weight = chunk_mask.float()[..., None]
    return (features.float().mean(2) * weight).sum(1) / weight.sum(1)


def unlike(percentile: float | None) -> bool:
    """Whether a scan is to be called unlike the training scans."""
    return percentile is not None and percentile > UNLIKE


def describe(percentile: float | None) -> str:
    """What people are told of a percentile; "" where there is nothing to say."""
    if percentile is None:
        return "not known to be like the training scans: the checkpoint keeps no statistics of them"
    return f"unlike the training scans (farther than {percentile:g} % of them)" if unlike(percentile) else ""


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    from sklearn.covariance import ledoit_wolf  # a second of start-up, for the end of a training

    covariance, _ = ledoit_wolf(x.double().numpy())
    return x.mean(0), torch.linalg.inv(torch.from_numpy(covariance)).float()


def _distances(x: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    apart = x.float() - mean
    return ((apart @ precision) * apart).sum(1).clamp(min=0).sqrt()

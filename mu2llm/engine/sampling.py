"""How the next token is chosen: greedily, or sampled so that a case's n-th sample is the same in any batch."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """How texts are drawn: greedy at temperature 0 (and one sample then), else nucleus sampling."""

    max_new_tokens: int = 256
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"{self.samples} greedy samples would all be the same; give a temperature above 0")


def draws(key: str, decoding: Decoding) -> np.ndarray:
    """(samples, max_new_tokens) uniform numbers in [0, 1) that depend on nothing but seed, key and sample."""
    seeds = ([decoding.seed, zlib.crc32(key.encode()), sample] for sample in range(decoding.samples))
    return np.stack([np.random.default_rng(seed).random(decoding.max_new_tokens) for seed in seeds])


def nucleus(scores: Tensor, uniform: Tensor, temperature: Tensor | float, top_p: Tensor | float) -> Tensor:
    """Scores (R, vocabulary) → ids (R, 1), drawn from the fewest tokens that hold `top_p` of the probability.

    `uniform` (R, 1) are the numbers they are drawn by; `temperature` and `top_p` are (R, 1), or one for all rows.
    """
    probability, order = (scores.double() / temperature).softmax(-1).sort(dim=-1, descending=True)
    below = probability.cumsum(-1) - probability
    size = (below < top_p).sum(-1, keepdim=True)
    mass = (below + probability).gather(-1, size - 1)
    place = ((below <= uniform * mass).sum(-1, keepdim=True) - 1).clamp(min=0)
    return order.gather(-1, place.minimum(size - 1))

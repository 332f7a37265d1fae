"""Batch standardisation by running statistics, kept in the checkpoint."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import initialization as init

from mu2llm.model.initialisation import Initialised, Statistics


class RunningStandardise(Statistics, Initialised):
    """Batch standardisation: per channel zero mean and unit variance over all tokens, by running statistics.

    All scans share the same anatomy: unstandardised, their tokens are nearly one vector. In training mode the
    statistics follow the batch (of all workers); they are constants to the gradient and are also what
    training normalises by, so that a token never depends on the others in its batch and evaluation sees what
    training saw.
    """

    mean: Tensor
    variance: Tensor
    updates: Tensor

    def __init__(self, width: int, momentum: float = 0.02, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def initialise(self) -> None:
        init.zeros_(self.mean)
        init.ones_(self.variance)
        init.zeros_(self.updates)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, E) → the same; `mask` is over x's leading dimensions: False tokens do not count in the statistics."""
        if self.training:
            self._update(x.detach(), mask)
        return ((x - self.mean) * torch.rsqrt(self.variance + self.epsilon)).to(x.dtype)

    @torch.no_grad()
    def _update(self, x: Tensor, mask: Tensor | None) -> None:
        weight = (
            torch.ones_like(x[..., :1]) if mask is None else mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
        )
        weight = weight.expand_as(x[..., :1]).flatten(0, -2).float()
        tokens = x.flatten(0, -2).float()
        sums = torch.cat([(tokens * weight).sum(0), (tokens.square() * weight).sum(0), weight.sum(0)])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        total, squares = sums[:-1].div(sums[-1].clamp(min=1)).chunk(2)
        # the mean of what was seen so far, until there was enough for a moving one
        share = torch.clamp(1 / (self.updates + 1), min=self.momentum).to(self.mean.dtype)
        self.mean.lerp_(total.to(self.mean.dtype), share)
        self.variance.lerp_((squares - total.square()).clamp(min=0).to(self.variance.dtype), share)
        self.updates.add_(1)

"""Which of a scan's tokens go on, and at which scales: DTS, hard top-k and DMTP (METHOD.md §1.2)."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from mu2llm.errors import UserError
from mu2llm.model.configuration import Mu2TokenizerConfig
from mu2llm.model.initialisation import Initialised, Statistics


class Selected(NamedTuple):
    """`tokens` (B, k, E), `valid` (B, k) or None where all are, `weights` (B, k, tokens of the scan) or None."""

    tokens: Tensor
    valid: Tensor | None
    weights: Tensor | None


class DifferentiableSelection(Statistics, Initialised):
    """Differentiable token selection (DTS, METHOD.md §1.2): k soft tokens, each a softmax-weighted mean over all tokens
    of all chunks. One product, no loop.

    With `normalise_scores` the scores come from normalised tokens and start with unit-free spread, so that the
    soft tokens do not begin as k copies of the mean.
    """

    step: Tensor

    def __init__(self, config: Mu2TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.score = nn.Linear(config.hidden_size, config.top_k, bias=False)  # a bias leaves a softmax as it is
        self.norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False) if config.normalise_scores else None
        if config.temperature_mode == "learned":
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))
        if config.temperature_mode == "annealed":
            self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def initialise(self) -> None:
        """Scores of spread 2: each soft token starts with a few tokens of its own."""
        if self.norm is not None:
            init.normal_(self.score.weight, std=2 * self.config.hidden_size**-0.5)
        if self.config.temperature_mode == "learned":
            init.constant_(self.log_temperature, math.log(self.config.temperature))
        if self.config.temperature_mode == "annealed":
            init.zeros_(self.step)

    def temperature(self) -> Tensor | float:
        """τ now: as configured, learned, or on its way from `temperature` to `temperature_end`."""
        config = self.config
        if config.temperature_mode == "learned":
            return self.log_temperature.exp()
        if config.temperature_mode == "annealed":
            done = (self.step / config.annealing_steps).clamp(max=1)
            return config.temperature * (config.temperature_end / config.temperature) ** done
        return config.temperature

    def forward(self, x: Tensor, mask: Tensor | None = None, return_weights: bool = False) -> Selected:
        """x (B, n, E), mask (B, n) False for padding → k soft tokens (B, k, E)."""
        if self.training and self.config.temperature_mode == "annealed":
            self.step.add_(1)
        scores = self.score.weight @ (x if self.norm is None else self.norm(x)).transpose(1, 2)
        scores = scores / self.temperature()
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        weights = scores.softmax(-1)
        return Selected(weights @ x, None, weights if return_weights else None)


class TopKSelection(nn.Module):
    """Hard top-k token selection, LinVT's: the k tokens of the highest score, in that order.

    `straight_through` leaves the tokens as they are and hands the gradient of σ(score) on to the scores.
    """

    def __init__(self, config: Mu2TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.score = nn.Linear(config.hidden_size, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_weights: bool = False) -> Selected:
        """x (B, n, E), mask (B, n) → k tokens (B, k, E); those beyond the unmasked ones are zero and not valid.

        Raises UserError where k is more than n.
        """
        if self.config.top_k > x.shape[1]:
            raise UserError(f"top_k {self.config.top_k} is more than the {x.shape[1]} tokens there are")
        scores = self.score(x).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        best, index = scores.topk(self.config.top_k, dim=1)
        tokens = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        valid = None if mask is None else best.isfinite()
        if self.config.straight_through:
            gate = best.masked_fill(best.isinf(), 0).sigmoid()[..., None]
            tokens = tokens * (1 + gate - gate.detach())
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None], 0)
        weights = F.one_hot(index, x.shape[1]).to(x.dtype) if return_weights else None
        return Selected(tokens, valid, weights)


Pooled = list[tuple[Tensor, Tensor | None]]
"""Of each scale the tokens (B, k/scale, E), and which of them are valid (B, k/scale), None where all are."""


class MeanGate(nn.Linear):
    """DMTP's gate as published: g(mean(y_s)), linear. Inert: where a scale divides k, the mean of its pooled tokens is
    that of all tokens, so that every scale weighs 1/S whatever g learns (METHOD.md §2.8, 23)."""

    def __init__(self, width: int, scales: int) -> None:
        super().__init__(width, 1, bias=False)  # as above: no bias

    def forward(self, pooled: Pooled) -> Tensor:  # type: ignore[override]
        """→ scores (B, scales)"""
        return super().forward(torch.stack([_mean(y, valid) for y, valid in pooled], dim=1)).squeeze(-1)


class SpreadGate(Initialised):
    """DMTP's gate on what differs between scales: a small MLP, as the paper writes, on the mean and the spread of a
    scale's tokens (averaging takes spread away) and a vector of its own. All scales weigh the same at the start."""

    def __init__(self, width: int, scales: int) -> None:
        super().__init__()
        hidden = max(8, width // 8)
        self.hidden = nn.Linear(2 * width, hidden)
        self.scale = nn.Parameter(torch.zeros(scales, hidden))
        self.score = nn.Linear(hidden, 1, bias=False)

    def initialise(self) -> None:
        init.normal_(self.scale, std=0.02)
        init.zeros_(self.score.weight)

    def forward(self, pooled: Pooled) -> Tensor:
        """→ scores (B, scales)"""
        means = [_mean(y, valid) for y, valid in pooled]
        spreads = [_spread(y, valid, mean) for (y, valid), mean in zip(pooled, means, strict=True)]
        each = torch.cat([torch.stack(means, 1), torch.stack(spreads, 1)], dim=-1)
        return cast(Tensor, self.score(F.gelu(self.hidden(each) + self.scale))).squeeze(-1)


class MultiScalePooling(nn.Module):
    """Dynamic multi-scale token pooling (DMTP, METHOD.md §1.2): the selected tokens averaged in runs of each scale, one
    after another, each scale weighted by a gate; `static` pooling has no weights."""

    def __init__(self, config: Mu2TokenizerConfig) -> None:
        super().__init__()
        self.scales = [scale for scale in config.scales if scale <= config.top_k] or [1]
        gate = {"mean": MeanGate, "mlp": SpreadGate}[config.gate]
        self.gate = gate(config.hidden_size, len(self.scales)) if config.pooling == "dynamic" else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, k, E) → (B, Σ k/scale, E), which of them are valid, and the scales' weights (B, scales)."""
        pooled = [_pool(x, valid, scale) for scale in self.scales]
        masks = None if valid is None else torch.cat([m for _, m in pooled if m is not None], dim=1)
        tokens = [y for y, _ in pooled]
        if self.gate is None:
            return torch.cat(tokens, dim=1), masks, None
        weights = self.gate(pooled).softmax(-1)
        return torch.cat([y * weights[:, i, None, None] for i, y in enumerate(tokens)], dim=1), masks, weights

    def matrix(self, k: int, valid: Tensor | None, gates: Tensor | None) -> Tensor:
        """(B or 1, Σ k/scale, k): the same as a matrix on the selected tokens."""
        rows = []
        for i, scale in enumerate(self.scales):
            groups = k // scale
            row = F.pad(torch.eye(groups).repeat_interleave(scale, 1), (0, k - groups * scale))[None]
            row = row if valid is None else row.to(valid.device) * valid[:, None]
            row = row / row.sum(-1, keepdim=True).clamp(min=1)
            rows.append(row if gates is None else row.to(gates.device) * gates[:, i, None, None])
        return torch.cat(rows, dim=1)


def _pool(x: Tensor, valid: Tensor | None, scale: int) -> tuple[Tensor, Tensor | None]:
    if scale == 1:
        return x, valid
    groups = x.shape[1] // scale
    runs = x[:, : groups * scale].unflatten(1, (groups, scale))
    if valid is None:
        return runs.mean(2), None
    count = valid[:, : groups * scale].unflatten(1, (groups, scale)).sum(2)
    return runs.sum(2) / count.clamp(min=1)[..., None], count > 0


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return x.mean(1)
    return x.sum(1) / valid.sum(1, keepdim=True).clamp(min=1)


def _spread(x: Tensor, valid: Tensor | None, mean: Tensor) -> Tensor:
    """(B, n, E) → the standard deviation over its valid tokens, (B, E)."""
    squares = (x - mean[:, None]).square()
    squares = squares if valid is None else squares.masked_fill(~valid[..., None], 0)
    return (_mean(squares, valid) + 1e-6).sqrt()

"""Multi-head attention through `scaled_dot_product_attention`, with the positions of METHOD.md §1.2.

A position is either a bias on the scores, learned per head and offset (1-D, or 3-D on the grid of a chunk),
or a rotation of queries and keys (rotary, 1-D or 3-D).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from mu2llm.errors import UserError
from mu2llm.model.initialisation import Initialised


class RelativeBias1d(Initialised):
    """Relative position bias (RPE), 1-D: P_r(j − i) of each head (METHOD.md §1.2, A_ij; Shaw et al. 2018).

    A table over the offsets in a sequence of at most `max_positions`. With a `period` positions begin anew behind it.
    """

    def __init__(self, max_positions: int, heads: int, period: int | None = None) -> None:
        super().__init__()
        self.max_positions, self.period = max_positions, period
        self.table = nn.Parameter(torch.zeros(2 * max_positions - 1, heads))

    def initialise(self) -> None:
        init.zeros_(self.table)

    def forward(self, length: int) -> Tensor:
        """Bias (1, heads, length, length); UserError where `length` is more than the table holds."""
        if min(length, self.period or length) > self.max_positions:
            raise UserError(
                f"relative positions reach over {self.max_positions} tokens, the sequence has {length}: "
                "raise tokenizer.max_positions"
            )
        place = sequence(length, self.period, self.table.device)
        offset = place[None, :] - place[:, None] + self.max_positions - 1
        return _per_head(F.embedding(offset, self.table))


class RelativeBias3d(Initialised):
    """Relative position bias (RPE), 3-D: a table over the offsets (z, y, x) within a chunk's grid, for each head.

    The published bias is over flattened offsets (METHOD.md §2.8, 7).
    """

    def __init__(self, grid: tuple[int, ...], heads: int) -> None:
        super().__init__()
        self.grid = grid
        depth, height, width = (2 * size - 1 for size in grid)
        self.table = nn.Parameter(torch.zeros(depth * height * width, heads))

    def initialise(self) -> None:
        init.zeros_(self.table)

    def forward(self, length: int) -> Tensor:
        """(1, heads, length, length); length is the number of tokens of the grid."""
        place = coordinates(self.grid, self.table.device)
        offset = place[None, :] - place[:, None] + torch.tensor(self.grid, device=place.device) - 1
        _, height, width = (2 * size - 1 for size in self.grid)
        index = (offset[..., 0] * height + offset[..., 1]) * width + offset[..., 2]
        return _per_head(F.embedding(index, self.table))


class Rotary(nn.Module):
    """Rotary position embedding (RoPE, arXiv 2104.09864): pairs of channels rotated by position × frequency.

    With a `grid` it is 3-D: the pairs are divided among (z, y, x). With a `period` positions begin anew behind it.
    """

    def __init__(
        self, head_size: int, grid: tuple[int, ...] | None = None, base: float = 10000.0, period: int | None = None
    ) -> None:
        super().__init__()
        self.head_size, self.grid, self.base, self.period = head_size, grid, base, period

    def forward(self, x: Tensor) -> Tensor:
        """(B, heads, length, head_size) → the same, rotated."""
        angle = self._angles(x.shape[-2], x.device)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _angles(self, length: int, device: torch.device) -> Tensor:
        pairs = self.head_size // 2
        if self.grid is None:
            place = sequence(length, self.period, device).float()
            return place[:, None] * self._frequencies(pairs, device)
        place = coordinates(self.grid, device).float()
        shares = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
        return torch.cat([place[:, i, None] * self._frequencies(n, device) for i, n in enumerate(shares)], dim=-1)

    def _frequencies(self, pairs: int, device: torch.device) -> Tensor:
        step = torch.arange(pairs, device=device, dtype=torch.float32)
        return self.base ** (-step / max(pairs, 1))


def sequence(length: int, period: int | None, device: torch.device) -> Tensor:
    """(length,) integer places, which begin anew behind each `period`."""
    place = torch.arange(length, device=device)
    return place if period is None else place % period


def coordinates(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """(z·y·x, 3) integer places of a grid's tokens, in the order of the tokens."""
    axes = [torch.arange(size, device=device) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def _per_head(bias: Tensor) -> Tensor:
    return bias.permute(2, 0, 1).unsqueeze(0)


class SelfAttention(nn.Module):
    """Multi-head self-attention, with a position of the kinds above or none."""

    def __init__(self, width: int, heads: int, position: nn.Module | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.position = position

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, n, E) → (B, n, E); `mask` (B, n) is True for the tokens that may be attended to."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = additive_mask(mask, x.dtype)
        if isinstance(self.position, Rotary):
            q, k = self.position(q), self.position(k)
        elif self.position is not None:
            relative = self.position(length).to(x.dtype)
            bias = relative if bias is None else relative + bias
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return cast(Tensor, self.output(mixed.transpose(1, 2).reshape(batch, length, width)))


class CrossAttention(nn.Module):
    """Multi-head cross-attention, without positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """query (B, q, E), context (B, n, E) → (B, q, E); `mask` (B, n) is True where it may be attended to."""
        batch, length, width = query.shape
        q = self.query(query).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(context).view(batch, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=additive_mask(mask, query.dtype))
        return cast(Tensor, self.output(mixed.transpose(1, 2).reshape(batch, length, width)))


class LinearAggregation(nn.Module):
    """TTA's linear aggregation: each query becomes a weighted mean of the context itself, head by head.

    No value or output projection: what comes out is a linear combination of the tokens (METHOD.md §1.1, "linearity").
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """query (B, q, E), context (B, n, E) → (B, q, E); `mask` (B, n) is True where it may be attended to."""
        batch, length, width = query.shape
        q, k, v = self._heads(self.query(query)), self._heads(self.key(context)), self._heads(context)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=additive_mask(mask, query.dtype))
        return mixed.transpose(1, 2).reshape(batch, length, width)

    def weights(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, q, n): the weights of the combination, averaged over the heads."""
        q, k = self._heads(self.query(query)), self._heads(self.key(context))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        bias = additive_mask(mask, query.dtype)
        return (scores if bias is None else scores + bias).softmax(-1).mean(1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, n) True where attended → (B, 1, 1, n) to add to scores."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))[:, None, None]

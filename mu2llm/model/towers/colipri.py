"""COLIPRI's image encoder (Wald et al. 2026, arXiv 2510.15042): Primus-M on patches of 8³, and its text space.

Written from the published architecture (`Primus` of dynamic-network-architectures, EVA-02's blocks of timm): rotary
positions over three axes, SwiGLU with a norm, a norm within attention, layer scale.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mu2llm.errors import UserError
from mu2llm.settings.towers import TowerSpec

_TEMPERATURE = 10000.0
_LAYER_SCALE = 0.1


class PrimusAttention(nn.Module):
    """Self-attention with rotated queries and keys; no bias on the keys, a norm before the last map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """(B, n, width), (n, head), (n, head) → (B, n, width)"""
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k = (_rotated(each, sin, cos).to(v.dtype) for each in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return cast(Tensor, self.proj(self.norm(mixed)))


class SwiGlu(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → the same"""
        return cast(Tensor, self.fc2(self.norm(F.silu(self.fc1_g(x)) * self.fc1_x(x))))


class PrimusBlock(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU, each with a residual of learned size."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = PrimusAttention(width, heads)
        self.mlp = SwiGlu(width, int(width * 8 / 3))
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), _LAYER_SCALE)) for _ in range(2))

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """(B, n, width) → the same"""
        x = x + self.gamma_1 * self.attn(self.norm1(x), sin, cos)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class Primus(nn.Module):
    """Patches of a chunk, attending to each other over the whole of it."""

    def __init__(self, width: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        self.down_projection = nn.ModuleDict({"proj": nn.Conv3d(1, width, kernel_size=patch, stride=patch)})
        blocks = nn.ModuleList([PrimusBlock(width, heads) for _ in range(depth)])
        self.eva = nn.ModuleDict({"blocks": blocks, "norm": nn.LayerNorm(width)})
        self.head = width // heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, K, H, W) → (B, width, k, h, w)"""
        x = self.down_projection["proj"](x)
        grid = x.shape[2:]
        sin, cos = rotary(tuple(grid), self.head, x.device)
        x = x.flatten(2).transpose(1, 2)
        for block in cast(nn.ModuleList, self.eva["blocks"]):
            x = block(x, sin, cos)
        return cast(Tensor, self.eva["norm"](x)).transpose(1, 2).unflatten(2, grid)


class TextPooler(nn.Module):
    """Of the published attention pooling, what it makes of each place: the value and the output map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 1, batch_first=True)  # its weights are the same for any heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, width) → the same"""
        width = x.shape[-1]
        weight, bias = self.attn.in_proj_weight[2 * width :], self.attn.in_proj_bias[2 * width :]
        return cast(Tensor, self.attn.out_proj(F.linear(x, weight, bias)))


class Colipri(nn.Module):
    """The encoder, and where `projection` is not 0 its places in the space that it shares with the text encoder."""

    def __init__(self, chunk: tuple[int, ...], spec: TowerSpec) -> None:
        super().__init__()
        sizes = spec.sizes
        width, heads, projection = sizes["width"], sizes["heads"], sizes["projection"]
        if width % heads or width // heads % 6:
            raise UserError(
                f"tower colipri turns three axes: each of {heads} heads must have a multiple of 6 of {width} numbers; "
                "set model.vision.sizes.heads"
            )
        if any(size % sizes["patch"] for size in chunk):
            raise UserError(f"tower colipri: patches of {sizes['patch']} do not divide a chunk of {chunk}")
        self.scale = spec.scale
        self.backbone = Primus(width, sizes["depth"], heads, sizes["patch"])
        self.projector = nn.Conv3d(width, projection, kernel_size=1) if projection else None
        self.pooler = TextPooler(projection) if projection else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, K, H, W) of 0…1 → (N, k·h·w, projection or width)"""
        low, high = self.scale
        x = self.backbone(x * (high - low) + low)
        if self.projector is None or self.pooler is None:
            return x.flatten(2).transpose(1, 2)
        return cast(Tensor, self.pooler(self.projector(x).flatten(2).transpose(1, 2)))


def rotary(grid: tuple[int, ...], head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sine and cosine (places, head) of the turns at each place: a third of the head's pairs for each axis."""
    pairs = head // 6
    bands = _TEMPERATURE ** -(torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    axes = torch.meshgrid(*[torch.arange(n, device=device, dtype=torch.float32) for n in grid], indexing="ij")
    turns = (torch.stack(axes, dim=-1)[..., None] * bands).flatten(0, 2).flatten(1).repeat_interleave(2, dim=-1)
    return turns.sin(), turns.cos()


def _rotated(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin

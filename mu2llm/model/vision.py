"""The vision tower (a 3-D ViT over the patches of one chunk) and the spatial-pooling projector.

Blocks and weights are those of MONAI's ViT as M3D-CLIP uses it; importing MONAI itself costs every process
several seconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Self, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from mu2llm.model import towers
from mu2llm.model.batch_norm import BatchNorm3d
from mu2llm.model.configuration import Mu2VisionConfig
from mu2llm.model.initialisation import Initialised, Statistics
from mu2llm.model.standardise import RunningStandardise


class LinearStem(nn.Module):
    """Each patch flattened (z, y, x, channel) and projected."""

    def __init__(self, config: Mu2VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.projection = nn.Linear(config.channels * math.prod(config.patch_size), config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, K, H, W) → (B, patches, hidden)"""
        for axis, patch in zip((2, 4, 6), self.patch_size, strict=True):
            x = x.unflatten(axis, (-1, patch))
        patches = x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(1, 3).flatten(2)
        return cast(Tensor, self.projection(patches))


class ConvStem(Initialised):
    """Convolutional patch embedding: patches of half the size, then a strided 3 × 3 × 3; learns from few scans what a
    linear patch embedding does not. Its batch norm is over the batch of all workers.
    """

    def __init__(self, config: Mu2VisionConfig) -> None:
        super().__init__()
        half = _three(max(1, size // 2) for size in config.patch_size)
        stride = _three(size // part for size, part in zip(config.patch_size, half, strict=True))
        width = max(8, 3 * config.hidden_size // 8)
        grid = tuple(size // part for size, part in zip(config.chunk_shape, half, strict=True))
        self.patches = nn.Conv3d(config.channels, width, kernel_size=half, stride=half)
        self.norm = BatchNorm3d(width)
        self.places = nn.Parameter(torch.zeros(1, width, *grid))
        self.neighbours = nn.Conv3d(width, config.hidden_size, kernel_size=3, stride=stride, padding=1)
        self.norm_out = BatchNorm3d(config.hidden_size)

    def initialise(self) -> None:
        init.zeros_(self.places)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, K, H, W) → (B, patches, hidden)"""
        x = F.gelu(self.norm(self.patches(x))) + self.places
        return F.gelu(self.norm_out(self.neighbours(x))).flatten(2).transpose(1, 2)


class VisionAttention(nn.Module):
    """Multi-head self-attention as in MONAI's ViT: no bias on q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, hidden) → the same"""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width)))


class VisionBlock(GradientCheckpointingLayer):
    """Pre-norm attention and MLP with residuals; the parameters are named as in MONAI's TransformerBlock."""

    def __init__(self, config: Mu2VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = VisionAttention(width, config.num_heads)
        self.mlp = nn.ModuleDict(
            {"linear1": nn.Linear(width, config.mlp_dim), "linear2": nn.Linear(config.mlp_dim, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, hidden) → the same"""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["linear2"](F.gelu(self.mlp["linear1"](self.norm2(x))))


class VisionTower(Initialised):
    """The 3-D ViT of M3D-CLIP (METHOD.md §1.1) on the chunks of scans."""

    def __init__(self, config: Mu2VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvStem(config) if config.stem == "conv" else LinearStem(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, math.prod(config.grid), config.hidden_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.class_token else None
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)

    def initialise(self) -> None:
        init.normal_(self.position_embeddings, std=0.02)
        if self.cls_token is not None:
            init.zeros_(self.cls_token)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, K, H, W) → (B, [class +] patches, hidden)"""
        x = self.stem(x) + self.position_embeddings
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.norm(x))


class MeanImageSubtraction(Statistics, Initialised):
    """Mean-image subtraction: each voxel less its mean over the first scans that were seen.

    All scans of one field of view are nearly the same image; a network from scratch spends most of its time
    on learning that. Only for specs that put every body on the same grid. The mean is over the first `BATCHES`
    training batches (of all workers) and constant from then on.
    """

    BATCHES = 256

    mean: Tensor
    variance: Tensor
    updates: Tensor

    def __init__(self, config: Mu2VisionConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(config.chunks, config.channels, *config.chunk_shape))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.seen: int | None = None  # what `updates` says, known without asking the GPU in every step
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "seen", None))

    def initialise(self) -> None:
        init.zeros_(self.mean)
        init.ones_(self.variance)
        init.zeros_(self.updates)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, C, K, H, W), (B, T) → the same shape, of variance about 1"""
        if self.training:
            self.seen = int(self.updates) if self.seen is None else self.seen
            if self.seen < self.BATCHES:
                self._update(x.detach(), x.new_ones(x.shape[:2]) if mask is None else mask)
                self.seen += 1
        return (x - self.mean[: x.shape[1]]) * torch.rsqrt(self.variance + 1e-5)

    @torch.no_grad()
    def _update(self, x: Tensor, mask: Tensor) -> None:
        weight = mask.to(x.dtype)[..., None, None, None, None]
        mean = self.mean[: x.shape[1]]
        total, count = (x * weight).sum(0), weight.sum(0)
        spread = torch.stack([((x - mean).square() * weight).sum(), weight.sum() * math.prod(x.shape[2:])])
        for part in (total, count, spread):
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(part)
        share = (1 / (self.updates + 1)).to(mean.dtype)
        mean.add_((total / count.clamp(min=1) - mean) * share * (count > 0))
        self.variance.lerp_((spread[0] / spread[1].clamp(min=1)).to(self.variance.dtype), share)
        self.updates.add_(1)


class Projector(nn.Module):
    """Spatial-pooling projector: an MLP from pooled patches to the μ²Tokenizer's width."""

    def __init__(self, config: Mu2VisionConfig, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(config.hidden_size, width)]
        for _ in range(1, config.projector_layers):
            layers += [nn.GELU(), nn.Linear(width, width)]
        self.layers = nn.Sequential(*layers)
        self.standardise = RunningStandardise(width) if config.standardise else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, hidden) → (…, width); `mask` is over x's leading dimensions, for the running statistics."""
        projected = cast(Tensor, self.layers(x))
        return projected if self.standardise is None else self.standardise(projected, mask)


def pool_patches(x: Tensor, config: Mu2VisionConfig) -> Tensor:
    """(B, patches, hidden) → (B, pooled patches, hidden): the mean over cubes of patches on the grid."""
    grid, edge = config.projector_grid, config.pooling
    split = [part for size in grid for part in (size // edge, edge)]
    return x.unflatten(1, split).mean(dim=(2, 4, 6)).flatten(1, 3)


def spread_to_patches(weights: Tensor, config: Mu2VisionConfig) -> Tensor:
    """The inverse for weights (…, z, y, x) of pooled patches: each shared out among the patches it is the mean of."""
    for axis in (-3, -2, -1):
        weights = weights.repeat_interleave(config.pooling, dim=axis) / config.pooling
    return weights.flatten(-3).unflatten(-1, config.grid)


class VisionEncoder(nn.Module):
    """Vision tower and pooling: what turns the chunks of a scan into features. Both models are built on it."""

    def __init__(self, config: Mu2VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.anatomy = MeanImageSubtraction(config) if config.standardise_input else None
        self.tower: nn.Module = VisionTower(config) if config.tower == "m3d" else towers.build(config)
        self.frozen = False

    def freeze(self) -> None:
        """No gradient, and evaluation mode for good: the running statistics stay as they are."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def unfreeze(self) -> None:
        """Undoes `freeze`."""
        self.frozen = False
        self.requires_grad_(True).train()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def forward(self, volumes: Tensor, chunk_mask: Tensor | None = None, full_chunks: int | None = None) -> Tensor:
        """(B, T, C, K, H, W), (B, T) → (B, T, n, hidden). Only chunks that hold something are encoded.

        `full_chunks` is how many these are, the sum of the mask: who knows it spares the CPU waiting for the GPU.
        """
        scale = 1.0 if volumes.is_floating_point() else 1 / 255
        volumes = volumes.to(self._dtype) * scale
        if self.config.chunks_see_each_other:
            return cast(Tensor, self.tower.scans(volumes, chunk_mask))  # type: ignore[operator]
        if self.anatomy is not None:
            volumes = self.anatomy(volumes, chunk_mask)
        if chunk_mask is None or chunk_mask.is_meta:  # which chunks hold something, nobody knows there
            return self._encode(volumes.flatten(0, 1)).unflatten(0, volumes.shape[:2])
        count = int(chunk_mask.sum()) if full_chunks is None else full_chunks
        places = (~chunk_mask).flatten().byte().argsort(stable=True)[:count]
        features = self._encode(volumes.flatten(0, 1)[places])
        out = features.new_zeros(chunk_mask.numel(), *features.shape[1:])
        return out.index_copy(0, places, features).unflatten(0, chunk_mask.shape)

    @property
    def _dtype(self) -> torch.dtype:
        if isinstance(self.tower, VisionTower):
            return self.tower.position_embeddings.dtype
        return functools.reduce(torch.promote_types, {each.dtype for each in self.tower.parameters()})

    def _encode(self, chunks: Tensor) -> Tensor:
        patches = self.tower(chunks)
        return pool_patches(patches[:, 1:] if self.config.class_token else patches, self.config)


def _three(sizes: Iterable[int]) -> tuple[int, int, int]:
    depth, height, width = sizes
    return depth, height, width

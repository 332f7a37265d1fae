"""The μ²Tokenizer (arXiv 2507.00316 §2.2): many visual tokens and a question → few tokens for the language model.

Spatio-temporal attention → selection → multi-scale pooling → text-conditioned queries → linear aggregation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from mu2llm.model.attention import (
    CrossAttention,
    LinearAggregation,
    RelativeBias1d,
    RelativeBias3d,
    Rotary,
    SelfAttention,
)
from mu2llm.model.bridge import LanguageBridge
from mu2llm.model.configuration import Mu2TokenizerConfig
from mu2llm.model.initialisation import Initialised
from mu2llm.model.selection import DifferentiableSelection, MultiScalePooling, Selected, TopKSelection
from mu2llm.model.series import SeriesEmbedding
from mu2llm.model.standardise import RunningStandardise


@dataclass
class VisualTokens(ModelOutput):
    """What a scan is to the language model.

    `tokens` (B, queries, the language model's width). On request `selection` (B, queries, T, z, y, x): each token's
    weight over the scan's patches, summing to 1 (without the mixing by attention before the selection), and two
    numbers that tell a collapse: `entropy` of the selection over that of a uniform one, `similarity` the mean
    cosine between the selected tokens of a scan.
    """

    tokens: Tensor | None = None
    selection: Tensor | None = None
    entropy: Tensor | None = None
    similarity: Tensor | None = None


class PlaceEmbedding(Initialised):
    """Absolute position embedding of chunk, z, y and x, learned and added to every token (METHOD.md §2.8, 7); the same
    for the `chunks` of each series of an examination."""

    def __init__(self, chunks: int, grid: tuple[int, ...], width: int, series: int = 1) -> None:
        super().__init__()
        self.series = series
        self.axes = nn.ParameterList([nn.Parameter(torch.zeros(size, width)) for size in (chunks, *grid)])

    def initialise(self) -> None:
        for axis in self.axes:
            init.normal_(axis, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, n, E) → the same."""
        chunk, z, y, x_axis = self.axes
        inside = z[:, None, None] + y[None, :, None] + x_axis[None, None]
        return x + chunk.repeat(self.series, 1)[: x.shape[1], None] + inside.flatten(0, 2)


class SpatioTemporalLayer(GradientCheckpointingLayer):
    """Spatio-temporal attention: among the tokens of a chunk, then among the chunks at a place (METHOD.md §1.1)."""

    def __init__(self, config: Mu2TokenizerConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.config = config
        self.spatial = SelfAttention(width, heads, _spatial_position(config))
        self.temporal = SelfAttention(width, heads, _chunk_position(config))
        if config.residual:
            self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
            self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, chunk_mask: Tensor | None = None) -> Tensor:
        """x (B, T, n, E) → the same shape; chunk_mask (B, T) is False for padded chunks."""
        if not self.config.residual:
            return self._temporal(self._spatial(x), chunk_mask)
        x = x + self._spatial(self.norms[0](x))
        x = x + self._temporal(self.norms[1](x), chunk_mask)
        return x + self.feed_forward(self.norms[2](x))

    def _spatial(self, x: Tensor) -> Tensor:
        return self._attend(self.spatial, x.flatten(0, 1)).view_as(x)

    def _temporal(self, x: Tensor, chunk_mask: Tensor | None) -> Tensor:
        across = x.transpose(1, 2)
        mask = None if chunk_mask is None else chunk_mask.repeat_interleave(x.shape[2], dim=0)
        mixed = self._attend(self.temporal, across.flatten(0, 1), mask)
        return mixed.view_as(across).transpose(1, 2)

    def _attend(self, attention: SelfAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.config.batch_first:
            return attention(x, mask)
        return attention(x.transpose(0, 1)).transpose(0, 1)  # the published baseline's axis, wrong on purpose


class TextConditionedLayer(GradientCheckpointingLayer):
    """Text-conditioned token aggregation (TTA, METHOD.md §1.2): queries attend to each other, to the visual tokens,
    and to the question."""

    def __init__(self, config: Mu2TokenizerConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.batch_first = config.batch_first
        self.among = SelfAttention(width, heads, _sequence_position(config, config.queries))
        self.visual = CrossAttention(width, heads)
        self.norm_among, self.norm_visual = nn.LayerNorm(width), nn.LayerNorm(width)
        if config.text_conditioned:
            self.text = CrossAttention(width, heads)
            self.norm_text = nn.LayerNorm(width)

    def forward(
        self,
        query: Tensor,
        visual: Tensor,
        text: Tensor | None,
        visual_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """query (B, q, E), visual (B, n, E), text (B, L, E) or None → (B, q, E); masks (B, n), (B, L)."""
        among = self.among(query) if self.batch_first else self.among(query.transpose(0, 1)).transpose(0, 1)
        query = self.norm_among(query + among)
        query = self.norm_visual(query + self.visual(query, visual, visual_mask))
        if text is None:
            return query
        return self.norm_text(query + self.text(query, text, text_mask))


class Mu2Tokenizer(Initialised):
    """The μ²Tokenizer: spatio-temporal attention → DTS → DMTP → TTA → linear aggregation (METHOD.md §1.2)."""

    def __init__(self, config: Mu2TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.series = SeriesEmbedding(config.series, config.chunks_a_series, width) if config.series > 1 else None
        places = (config.chunks_a_series, tuple(config.grid), width, config.series)
        self.places = PlaceEmbedding(*places) if config.positions else None
        self.layers = nn.ModuleList([SpatioTemporalLayer(config) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(width) if config.residual else nn.Identity()
        differentiable = config.selection == "differentiable"
        self.selection = DifferentiableSelection(config) if differentiable else TopKSelection(config)
        self.pooling = MultiScalePooling(config)
        self.queries = nn.Parameter(torch.zeros(1, config.queries, width))
        self.aggregation_layers = nn.ModuleList([TextConditionedLayer(config) for _ in range(config.num_layers)])
        self.aggregation = LinearAggregation(width, config.num_heads)
        self.standardise = RunningStandardise(width) if config.standardise else None
        bridged = config.language_size is not None or config.output_scale != "none"
        self.bridge = LanguageBridge(config) if bridged else None

    def initialise(self) -> None:
        init.normal_(self.queries, std=0.02)

    def forward(
        self,
        visual: Tensor,
        text: Tensor | None = None,
        chunk_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        return_selection: bool = False,
    ) -> VisualTokens:
        """visual (B, T, n, E), text (B, L, E') → tokens (B, queries, E'), E' being the language model's width.

        chunk_mask (B, T) and text_mask (B, L) are False for padding; no `text`, no conditioning on it.
        """
        if not self.config.mask_padding:
            chunk_mask = text_mask = None
        if self.bridge is not None and text is not None:
            text = self.bridge.down(text)
        significant = self.significance(visual, chunk_mask)
        selected = self.select(significant, chunk_mask, return_selection)
        multiscale, mask, gates = self.pooling(selected.tokens, selected.valid)
        query = self.query(multiscale, text if self.config.text_conditioned else None, mask, text_mask)
        tokens = self.aggregation(query, multiscale, mask)
        if self.standardise is not None:
            tokens = self.standardise(tokens)
        tokens = self.to_language(tokens)
        if not return_selection:
            return VisualTokens(tokens=tokens)
        assert selected.weights is not None
        pooling = self.pooling.matrix(self.config.top_k, selected.valid, gates).to(tokens)
        share = self.aggregation.weights(query, multiscale, mask) @ pooling
        chunks = visual.shape[1] if chunk_mask is None else chunk_mask.sum(1)
        return VisualTokens(
            tokens=tokens,
            selection=self._maps(share @ selected.weights, visual.shape[1]),
            entropy=entropy(selected.weights, chunks * visual.shape[2]),
            similarity=similarity(selected.tokens),
        )

    def to_language(self, tokens: Tensor) -> Tensor:
        """(B, n, E) → (B, n, the language model's width)"""
        return tokens if self.bridge is None else self.bridge.up(tokens)

    def _maps(self, weights: Tensor, chunks: int) -> Tensor:
        """(B, queries, T·n) → (B, queries, T, z, y, x), summing to 1."""
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
        return weights.unflatten(-1, (chunks, *self.config.grid))

    def significance(self, visual: Tensor, chunk_mask: Tensor | None = None) -> Tensor:
        """Spatio-temporal attention: (B, T, n, E) → the same."""
        x = visual if self.series is None else self.series(visual)
        x = x if self.places is None else self.places(x)
        for layer in self.layers:
            x = layer(x, chunk_mask)
        return self.norm(x)

    def select(self, x: Tensor, chunk_mask: Tensor | None = None, return_weights: bool = False) -> Selected:
        """(B, T, n, E) → the selected tokens (B, k, E), over all chunks."""
        mask = None if chunk_mask is None else chunk_mask.repeat_interleave(x.shape[2], dim=1)
        return self.selection(x.flatten(1, 2), mask, return_weights)

    def query(
        self, multiscale: Tensor, text: Tensor | None, mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """The queries after all layers: (B, queries, E)."""
        query = self.queries.expand(len(multiscale), -1, -1)
        for layer in self.aggregation_layers:
            query = layer(query, multiscale, text, mask, text_mask)
        return query


def _spatial_position(config: Mu2TokenizerConfig) -> nn.Module | None:
    heads, size = config.num_heads, config.hidden_size // config.num_heads
    match config.attention:
        case "relative_1d":
            return RelativeBias1d(config.max_positions, heads)
        case "relative_3d":
            return RelativeBias3d(tuple(config.grid), heads)
        case "rotary_1d":
            return Rotary(size)
        case "rotary_3d":
            return Rotary(size, tuple(config.grid))
        case _:
            return None


def _chunk_position(config: Mu2TokenizerConfig) -> nn.Module | None:
    """Positions along the chunks, which each series has from its first on: chunks at one place are at no distance."""
    period = config.chunks_a_series if config.series > 1 else None
    return _sequence_position(config, config.chunks_a_series, period)


def _sequence_position(config: Mu2TokenizerConfig, longest: int, period: int | None = None) -> nn.Module | None:
    """Positions along the chunks, or along the queries."""
    if config.attention == "relative_1d":
        return RelativeBias1d(config.max_positions, config.num_heads, period)
    if config.attention == "relative_3d":
        return RelativeBias1d(longest, config.num_heads, period)
    if config.attention.startswith("rotary"):
        return Rotary(config.hidden_size // config.num_heads, period=period)
    return None


def entropy(weights: Tensor, tokens: Tensor | int) -> Tensor:
    """Entropy of each selected token's weights over ln(`tokens` that take part), averaged: 1 is uniform."""
    each = -torch.xlogy(weights, weights).sum(-1).mean(-1)
    return (each / torch.as_tensor(tokens, device=weights.device).clamp(min=2).log()).mean()


def similarity(tokens: Tensor) -> Tensor:
    """Mean cosine between two different selected tokens of a scan (B, k, E): 1 is a collapse."""
    unit = F.normalize(tokens, dim=-1)
    k = max(tokens.shape[1], 2)
    total = unit.sum(1).square().sum(-1)  # Σ_ij cos = |Σ_i u_i|²
    return ((total - k) / (k * (k - 1))).mean()

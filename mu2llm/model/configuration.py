"""Configurations of the μ²LLM: each field that mends a defect of the published code says so (METHOD.md §2.8).

A user sets them through `mu2llm.settings.model.ModelConfig`; the names are the same. Sizes are (z, y, x).
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

Attention = Literal["absolute", "relative_1d", "relative_3d", "rotary_1d", "rotary_3d"]


@strict
class Mu2VisionConfig(PreTrainedConfig):
    """The 3-D vision transformer that reads one chunk (C, K, H, W), and the spatial-pooling projector behind it.

    `true_grid` (mend 6): the projector pools cubes of the true patch grid; the published default took the
    chunk for (H, W, K), which pools patches that do not adjoin.

    Of another `tower` than m3d `hidden_size` and `patch_size` are width and stride of its output, `sizes` its own
    sizes; `own` names its class, `tiles` are the chunks along each axis.
    """

    model_type = "mu2llm_vision"

    tower: Literal["m3d", "colipri", "ct_fm", "merlin", "spectre", "own"] = "m3d"
    own: str | None = None
    sizes: dict | None = None
    tiles: list[int] | tuple[int, ...] | None = None
    chunk_shape: list[int] | tuple[int, ...] = (32, 256, 256)
    channels: int = 1
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    patch_size: list[int] | tuple[int, ...] = (4, 16, 16)
    stem: Literal["linear", "conv"] = "linear"
    class_token: bool = True
    pooling: int = 2
    projector_layers: int = 2
    standardise: bool = False
    standardise_input: bool = False
    chunks: int = 8
    true_grid: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.chunk_shape, self.patch_size = tuple(self.chunk_shape), tuple(self.patch_size)
        super().__post_init__(**kwargs)
        if any(size % patch for size, patch in zip(self.chunk_shape, self.patch_size, strict=True)):
            raise ValueError(f"patch_size {self.patch_size} does not divide the chunk {self.chunk_shape} (K, H, W)")
        if any(size % self.pooling for size in self.projector_grid):
            raise ValueError(f"pooling {self.pooling} does not divide the grid of patches {self.projector_grid}")

    def to_dict(self) -> dict[str, Any]:
        """Without what says nothing, as it came later: m3d's checkpoints keep their text and their digests."""
        values = super().to_dict()
        unset = {"tower": "m3d", "own": None, "sizes": None, "tiles": None}
        return {key: value for key, value in values.items() if key not in unset or value != unset[key]}

    @property
    def chunks_see_each_other(self) -> bool:
        """Whether the tower reads a scan's chunks together, so that features of one depend on the others."""
        return self.tower == "spectre"

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches of a chunk along (z, y, x)."""
        return tuple(size // patch for size, patch in zip(self.chunk_shape, self.patch_size, strict=True))

    @property
    def projector_grid(self) -> tuple[int, ...]:
        """The grid that the projector takes the patches for: the true one, or the published default's."""
        depth, height, width = self.chunk_shape
        taken = self.chunk_shape if self.true_grid else (height, width, depth)
        return tuple(size // patch for size, patch in zip(taken, self.patch_size, strict=True))

    @property
    def pooled_grid(self) -> tuple[int, ...]:
        """Tokens of a chunk along (z, y, x), behind the projector."""
        return tuple(size // self.pooling for size in self.projector_grid)

    @property
    def tokens(self) -> int:
        """Tokens of a chunk behind the projector."""
        return math.prod(self.pooled_grid)


@strict
class Mu2TokenizerConfig(PreTrainedConfig):
    """The μ²Tokenizer: RPE, DTS, DMTP and TTA (METHOD.md §1.2). Tokens come in as (B, chunks, z·y·x, hidden_size).

    Mends, each undone by the value in brackets: `batch_first` [False] attention over the tokens and not, as
    published for `absolute`, over the batch (1); `attention` relative_3d [relative_1d] true 3-D offsets (7);
    `positions` [False] tokens know their chunk and place (7); `residual` [False] residual, norm and feed-forward
    (8); `gate` mlp [mean] dynamic pooling weighs its scales by what differs between them (23; mean is also the gate of
    checkpoints that do not say); `normalise_scores` [False] selection starts, and stays, spread over the scan (9);
    `straight_through` [False] hard top-k lets gradients reach its scores (9); `mask_padding` [False] padded chunks
    and text take no part (10). `max_positions` is the longest sequence of a 1-D relative bias (512 as published).
    `chunks` are those of all `series` of an examination: each has its own places, from the first on, and beyond one a
    learned embedding says which it is.

    `language_size` is the language model's width where it is not `hidden_size`, as published; linear maps are between
    them then. `output_scale` embedding_rms [none] makes tokens as large as the language model's own embeddings.
    """

    model_type = "mu2llm_tokenizer"

    hidden_size: int = 2048
    chunks: int = 8
    grid: list[int] | tuple[int, ...] = (4, 8, 8)
    num_layers: int = 4
    num_heads: int = 8
    queries: int = 256
    top_k: int = 1024
    scales: list[int] | tuple[int, ...] = (1, 2, 4)
    attention: Attention = "relative_3d"
    selection: Literal["differentiable", "top_k"] = "differentiable"
    temperature: float = 1.0
    temperature_mode: Literal["fixed", "learned", "annealed"] = "fixed"
    temperature_end: float = 0.1
    annealing_steps: int = 1000
    pooling: Literal["dynamic", "static"] = "dynamic"
    gate: Literal["mean", "mlp"] = "mean"
    text_conditioned: bool = True
    standardise: bool = False
    language_size: int | None = None
    output_scale: Literal["none", "embedding_rms"] = "none"
    residual: bool = True
    positions: bool = True
    normalise_scores: bool = True
    straight_through: bool = True
    mask_padding: bool = True
    batch_first: bool = True
    max_positions: int = 512
    initializer_range: float = 0.02
    series: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        self.grid, self.scales = tuple(self.grid), tuple(self.scales)
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide the width {self.hidden_size}")
        if self.attention.startswith("rotary") and (self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"rotary attention needs an even head size, not {self.hidden_size}/{self.num_heads}")
        if not self.scales or any(scale < 1 for scale in self.scales):
            raise ValueError(f"scales {self.scales}: give at least one, each 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """As checkpoints of one series always were."""
        return _without_one_series(super().to_dict())

    @property
    def chunks_a_series(self) -> int:
        return self.chunks // self.series

    @property
    def multiscale_tokens(self) -> int:
        """Tokens after pooling, over all scales."""
        pooled = [self.top_k // scale for scale in self.scales if scale <= self.top_k]
        return sum(pooled) if pooled else self.top_k


@strict
class Mu2Config(PreTrainedConfig):
    """The μ²LLM. `spec` is the PreprocessSpec that the scans must have been prepared by, as plain values.

    `placeholder_aligned` (mend 5): visual tokens replace the volume placeholders; False puts them at positions
    1…queries whatever stands there, as published. `findings` are the diagnostic prior's, each a further visual token;
    none, no prior. `finding_head` is its head's sizes (`Mu2ContrastiveConfig.head`). With `finding_names` it is told in
    so many word tokens: the ids of each finding's name, `finding_ids`, and of what stands where no name does.
    """

    model_type = "mu2llm"
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(config_class=Mu2VisionConfig),
        "tokenizer_config": SubConfigSpec(config_class=Mu2TokenizerConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    tokenizer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    volume_token_id: int = 0
    placeholder_aligned: bool = True
    max_text_tokens: int = 512
    spec: dict | None = None
    findings: list[str] | tuple[str, ...] = ()
    finding_head: dict | None = None
    finding_names: int = 0
    finding_ids: list[list[int]] | tuple[list[int], ...] = ()
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        before = {name: kwargs.pop(f"finding_{name}", 0) for name in ("text_width", "head_width")}
        super().__post_init__(**kwargs)
        if before["head_width"]:  # as checkpoints had it whose head knew one way of looking
            self.finding_head = {**before, "hidden_size": self.vision.hidden_size, "chunks": self.vision.chunks}
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    @property
    def visual_tokens(self) -> int:
        """What the language model gets of a scan: the μ²Tokenizer's queries, and a token for each finding or the words
        of those that are likely."""
        return self.tokenizer.queries + (self.finding_names or len(self.findings))

    @property
    def vision(self) -> Mu2VisionConfig:
        """`vision_config`, which transformers lets be None or plain values, as what it is."""
        return cast(Mu2VisionConfig, self.vision_config)

    @property
    def tokenizer(self) -> Mu2TokenizerConfig:
        """`tokenizer_config`, which transformers lets be None or plain values, as what it is."""
        return cast(Mu2TokenizerConfig, self.tokenizer_config)

    @property
    def text(self) -> PreTrainedConfig:
        """`text_config`, which transformers lets be None or plain values, as what it is."""
        return cast(PreTrainedConfig, self.text_config)


@strict
class Mu2ContrastiveConfig(PreTrainedConfig):
    """The vision tower under a contrastive head; `hidden_size` is the tower's width.

    `encoder_width` is that of the sentence encoder whose embeddings the checkpoint whitens to `text_width`; 0 where
    texts come as the head reads them. `head_width` is that of each of the head's `num_heads`, `grid` that of a chunk's
    tokens along (z, y, x); older checkpoints have one head, which knows no places. `chunks` are those of all `series`.
    """

    model_type = "mu2llm_contrastive"
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(config_class=Mu2VisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 768
    chunks: int = 8
    text_width: int = 384
    encoder_width: int = 0
    head_width: int = 128
    num_heads: int = 1
    grid: tuple[int, ...] | list[int] = ()
    loss: Literal["infonce", "sigmoid"] = "sigmoid"
    spec: dict | None = None
    initializer_range: float = 0.02
    series: int = 1

    def to_dict(self) -> dict[str, Any]:
        """As checkpoints of one series always were."""
        return _without_one_series(super().to_dict())

    @property
    def head(self) -> dict[str, Any]:
        """The sizes of the head, of which another model makes the same."""
        names = ("hidden_size", "chunks", "text_width", "head_width", "num_heads", "grid", "series")
        return _without_one_series({name: getattr(self, name) for name in names})

    @property
    def vision(self) -> Mu2VisionConfig:
        """`vision_config`, which transformers lets be None or plain values, as what it is."""
        return cast(Mu2VisionConfig, self.vision_config)


def _without_one_series(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if (key, value) != ("series", 1)}

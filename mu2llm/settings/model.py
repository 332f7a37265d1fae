"""Settings of the μ²LLM: vision, μ²Tokenizer, language model."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from mu2llm.settings.section import Section, merged
from mu2llm.settings.towers import M3D_ALONE, TowerName, TowerSpec, tower_spec


class VisionConfig(Section):
    """The vision tower of each chunk, and the projector behind it (METHOD.md §1.1, §2).

    Sizes are those of the 3-D ViT `m3d`; other towers have `sizes` of their own, and bring their transform.
    """

    tower: TowerName = Field("m3d", description="m3d, an open tower of the field, or own")
    own: str | None = Field(None, description="tower own: python:MODULE:CLASS, with its TowerSpec as `spec`")
    sizes: dict[str, Any] = Field({}, description="of another tower than m3d, where they are not the published ones")
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    patch_size: tuple[int, int, int] = (4, 16, 16)
    stem: Literal["linear", "conv"] = "linear"
    class_token: bool = True
    pooling: int = Field(2, description="edge of the cubes of patches that the projector averages")
    projector_layers: int = 2
    standardise: bool = Field(False, description="projected features standardised by running statistics")
    standardise_input: bool = Field(False, description="subtract the running mean scan, voxel by voxel")
    true_grid: bool = Field(True, description="pool cubes of the true patch grid, not of the published default's")
    weights: str | None = Field(
        None, description="a checkpoint, or the tower's published weights by path, s3:// or hub name, to start from"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_tower(cls, values: Any) -> Any:
        """What m3d's sizes are to others: what a place of their output is made of."""
        if not isinstance(values, dict) or values.get("tower", "m3d") not in get_args(TowerName)[1:]:
            return values
        spec = tower_spec(values["tower"], values.get("own"), values.get("sizes"))
        kept = {key: value for key, value in values.items() if key not in M3D_ALONE}
        return {**kept, "hidden_size": spec.width, "patch_size": spec.stride, "class_token": False}

    @model_validator(mode="after")
    def _has_its_own(self) -> Self:
        if self.tower == "m3d" and self.sizes:
            raise ValueError("sizes are of other towers; those of m3d are settings of their own, such as hidden_size")
        if self.own and self.tower != "own":
            raise ValueError(f"own names a class, but the tower is {self.tower}: set tower=own")
        return self

    @property
    def spec(self) -> TowerSpec:
        """What the tower takes and gives."""
        return tower_spec(self.tower, self.own, self.sizes)


class TokenizerConfig(Section):
    """The μ²Tokenizer (METHOD.md §1.2)."""

    width: int | None = Field(
        None, ge=1, description="its own, mapped to the language model's (the paper's is 768); None: as wide as that"
    )
    num_layers: int = 4
    num_heads: int = 8
    queries: int = Field(256, description="visual tokens that the language model gets")
    prior: int = Field(
        0,
        ge=0,
        description="diagnostic prior: the so many most frequent findings of the training reports, each with its "
        "probability, by the contrastive stage's head, as one more visual token",
    )
    prior_names: int = Field(
        0,
        ge=0,
        description="tell the prior by the names of what is likely, in so many word tokens of the language model, "
        "instead of a learned token a finding: what is trained on words reads it at once",
    )
    top_k: int = 1024
    scales: tuple[int, ...] = (1, 2, 4)
    attention: Literal["absolute", "relative_1d", "relative_3d", "rotary_1d", "rotary_3d"] = "relative_3d"
    selection: Literal["differentiable", "top_k"] = "differentiable"
    temperature: float = Field(1.0, gt=0)
    temperature_mode: Literal["fixed", "learned", "annealed"] = "fixed"
    temperature_end: float = Field(0.1, gt=0, description="where an annealed temperature arrives")
    annealing_steps: int = Field(1000, ge=1, description="training steps that it takes")
    pooling: Literal["dynamic", "static"] = "dynamic"
    gate: Literal["mean", "mlp"] = Field(
        "mlp", description="what weighs dynamic pooling's scales; the published mean is the same at all of them"
    )
    residual: bool = Field(True, description="residual, norm and feed-forward in the attention layers")
    mask_padding: bool = Field(True, description="padded chunks and padded text take no part in attention")
    standardise: bool = Field(False, description="final tokens standardised by running statistics")
    output_scale: Literal["none", "embedding_rms"] = Field(
        "none",
        description="embedding_rms: tokens as large as the language model's embeddings, times a learned gain",
    )
    text_conditioned: bool = Field(True, description="queries also attend to the question (TTA)")
    positions: bool = Field(True, description="tokens know their chunk and their place in it")
    normalise_scores: bool = Field(True, description="selection scores from normalised tokens: it does not collapse")
    straight_through: bool = Field(True, description="hard top-k lets gradients reach its scores")
    batch_first: bool = Field(True, description="attend over the tokens; the published baseline did over the batch")
    max_positions: int = Field(512, ge=1, description="longest sequence of a 1-D relative position bias")
    weights: str | None = Field(
        None, description="a checkpoint of any language model: its vision, projector and tokenizer are where sft starts"
    )

    @property
    def visual_tokens(self) -> int:
        """What the language model gets of a scan."""
        return self.queries + (self.prior_names or self.prior)

    @model_validator(mode="after")
    def _names_what_it_tells(self) -> Self:
        if self.prior_names and not self.prior:
            raise ValueError("prior_names is how a diagnostic prior is told: set tokenizer.prior, of how many findings")
        return self


class SmallLanguageModel(Section):
    """The Llama that is trained from scratch where `model.language_model` is `small`."""

    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 512
    vocabulary: int = 512


class LoraSettings(Section):
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05


# the published implementation, defect by defect (METHOD.md §2.8)
_REFERENCE_FACE: dict[str, Any] = {
    "vision": {"true_grid": False},
    "tokenizer": {
        "attention": "relative_1d",
        "gate": "mean",
        "residual": False,
        "mask_padding": False,
        "positions": False,
        "normalise_scores": False,
        "straight_through": False,
    },
    "placeholder_aligned": False,
}


class ModelConfig(Section):
    language_model: str = Field("small", description="small, smollm2, or name or path of any HF causal LM or GGUF")
    text_encoder: str = Field("minilm", description="minilm, small, or name or path of any HF encoder")
    face: Literal["corrected", "reference"] = Field(
        "corrected", description="reference undoes every correction of the published code, where it is not set itself"
    )
    vision: VisionConfig = VisionConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    small: SmallLanguageModel = SmallLanguageModel()
    lora: LoraSettings | None = None
    placeholder_aligned: bool = Field(True, description="visual tokens go where the placeholders are, not to 1…n")
    max_text_tokens: int = 512

    @model_validator(mode="before")
    @classmethod
    def _face(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("face") != "reference":
            return values
        return merged(_REFERENCE_FACE, values)

    @model_validator(mode="after")
    def _as_published(self) -> Self:
        tokenizer = self.tokenizer
        if self.face == "reference" and (tokenizer.width is not None or tokenizer.output_scale != "none"):
            raise ValueError(
                "the published tokenizer is as wide as its language model and scales nothing: with face=reference "
                "unset tokenizer.width and tokenizer.output_scale"
            )
        if self.face == "reference" and tokenizer.prior:
            raise ValueError("the published model has no diagnostic prior: with face=reference unset tokenizer.prior")
        if tokenizer.weights and self.vision.weights:
            raise ValueError("tokenizer.weights brings the vision that it was trained with: unset vision.weights")
        return self

"""The μ²LLM: vision encoder → μ²Tokenizer → any causal language model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from mu2llm.errors import UserError
from mu2llm.model.configuration import Mu2Config
from mu2llm.model.head import IGNORED, next_token_logps, shapes_only
from mu2llm.model.initialisation import freeze_statistics, initialise
from mu2llm.model.mu2_tokenizer import Mu2Tokenizer, VisualTokens
from mu2llm.model.prior import DiagnosticPrior
from mu2llm.model.vision import (
    Projector,
    VisionEncoder,
    spread_to_patches,
)


class Mu2PreTrainedModel(PreTrainedModel):
    config_class = Mu2Config
    config: Mu2Config
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["VisionBlock", "SpatioTemporalLayer", "TextConditionedLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Our own modules; what belongs to the language model is initialised as it says itself."""
        initialise(module)


@dataclass
class Mu2ModelOutput(BaseModelOutputWithPast):
    """`visual_tokens` (B, queries, hidden): what the scan was to the language model; on request `selection`, their
    weights over the scan's patches, as in `VisualTokens`."""

    visual_tokens: Tensor | None = None
    selection: Tensor | None = None


@dataclass
class Mu2CausalLMOutput(CausalLMOutputWithPast):
    """`visual_tokens` (B, queries, hidden): what the scan was to the language model; on request `selection`, their
    weights over the scan's patches, as in `VisualTokens`; `alignment` where a head holds them against texts."""

    visual_tokens: Tensor | None = None
    selection: Tensor | None = None
    alignment: Tensor | None = None


class Mu2Model(Mu2PreTrainedModel):
    """Without the language model's head; gives its last hidden states."""

    def __init__(self, config: Mu2Config) -> None:
        super().__init__(config)
        self.vision = VisionEncoder(config.vision)
        self.projector = Projector(config.vision, config.tokenizer.hidden_size)
        self.mu2_tokenizer = Mu2Tokenizer(config.tokenizer)
        self.prior = DiagnosticPrior(config) if config.findings else None
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def put_prior(
        self, findings: Sequence[str], head: dict[str, Any], names: int = 0, ids: Sequence[list[int]] = ()
    ) -> DiagnosticPrior:
        """A fresh diagnostic prior of these findings, for a contrastive head of these sizes; told in so many word
        tokens of `ids`, as `name_ids` gives them, where `names` is not 0."""
        self.config.findings, self.config.finding_head = list(findings), head
        self.config.finding_names, self.config.finding_ids = names, list(ids) if names else []
        self.prior = prior = DiagnosticPrior(self.config).apply(initialise)
        return prior

    def encode_vision(
        self, volumes: Tensor, chunk_mask: Tensor | None = None, full_chunks: int | None = None
    ) -> Tensor:
        """(B, T, C, K, H, W) → pooled features (B, T, n, vision width); integer volumes stand for 0…1 in 255 steps.

        `full_chunks` is the sum of the mask, where it is known: then nothing waits for the GPU to tell it.
        Raises UserError where the shape is not the configuration's, or a scan has no chunk (in training on a GPU
        nobody looks).
        """
        self._check_volumes(volumes)
        if chunk_mask is None:
            return cast(Tensor, self.vision(volumes))
        if self._looks_at(chunk_mask) and not bool(chunk_mask.bool().any(1).all()):
            raise UserError("chunk_mask leaves a scan without any chunk; at least one must be True")
        return cast(Tensor, self.vision(volumes, chunk_mask.bool(), full_chunks))

    def encode_volumes(
        self,
        volumes: Tensor | None = None,
        chunk_mask: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        vision_features: Tensor | None = None,
        return_selection: bool = False,
        full_chunks: int | None = None,
    ) -> VisualTokens:
        """Scans, or their features from `encode_vision`, → what `forward` and `generate` take as `visual_tokens`.

        question_ids (k·B, L) may be several for each scan: it is then encoded once and repeated.
        """
        if vision_features is None:
            if volumes is None:
                raise UserError("give volumes, vision_features or visual_tokens")
            vision_features = self.encode_vision(volumes, chunk_mask, full_chunks)
        text = None if question_ids is None else self.get_input_embeddings()(question_ids)
        rows = len(vision_features) if text is None else len(text)
        projected = self.projector(vision_features.to(self.dtype), chunk_mask)
        features, chunk_of_scan = _serve(projected, rows, "questions"), chunk_mask
        chunk_mask = None if chunk_mask is None else _serve(chunk_mask.bool(), rows, "questions")
        question_mask = None if question_mask is None else question_mask.bool()
        visual = cast(VisualTokens, self.mu2_tokenizer(features, text, chunk_mask, question_mask, return_selection))
        if self.prior is not None:
            tokens = cast(Tensor, visual.tokens)
            findings = self._findings(self.prior, vision_features, chunk_of_scan).to(tokens.dtype)
            visual.tokens = torch.cat([tokens, _serve(findings, rows, "questions")], dim=1)
        if visual.selection is not None:
            visual.selection = spread_to_patches(visual.selection, self.config.vision)
        return visual

    def _findings(self, prior: DiagnosticPrior, vision_features: Tensor, chunk_mask: Tensor | None) -> Tensor:
        """What a prior tells of scans (B, …), as the language model takes it: (B, its tokens, hidden)"""
        if prior.length:
            return cast(Tensor, self.get_input_embeddings()(prior.names(vision_features, chunk_mask)))
        return self.mu2_tokenizer.to_language(prior(vision_features, chunk_mask))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        volumes: Tensor | None = None,
        vision_features: Tensor | None = None,
        visual_tokens: Tensor | VisualTokens | None = None,
        chunk_mask: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        tile_scans: bool = False,
        return_selection: bool = False,
        full_chunks: int | None = None,
        right_padded: bool = False,
        **kwargs: Any,
    ) -> Mu2ModelOutput:
        """input_ids (R, L) with their `<volume>` placeholders, and scans → last hidden states (R, L, hidden).

        Scans are `volumes` (B, T, C, K, H, W), or `vision_features` (B, T, n, vision width) as `encode_vision` gives,
        or `visual_tokens` (B, queries, hidden) as `encode_volumes` gives; chunk_mask (B, T), question_ids and
        question_mask (B, L') go with the first two, `full_chunks` (as in `encode_vision`) with the first. B scans may
        serve R = k·B sequences: each scan k adjoining rows, or with `tile_scans` rows i, B + i, 2B + i … (DPO: all
        chosen before all rejected). `selection` is of the scans, not the rows.
        `right_padded` says so of all rows: behind a causal mask nothing sees their padding, so that attention needs no
        other mask (and takes faster kernels), and nothing waits for the GPU to tell whether there is any.

        Without input_ids and inputs_embeds it ends with the visual tokens. Raises UserError where rows are not a
        multiple of the scans, or a row's placeholders are not as many as the visual tokens.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if visual_tokens is None and (volumes is not None or vision_features is not None):
            visual_tokens = self.encode_volumes(
                volumes, chunk_mask, question_ids, question_mask, vision_features, return_selection, full_chunks
            )
        tokens = visual_tokens.tokens if isinstance(visual_tokens, VisualTokens) else visual_tokens
        selection = visual_tokens.selection if isinstance(visual_tokens, VisualTokens) else None
        if return_selection and selection is None:
            raise UserError(
                "return_selection needs a scan: give volumes, or vision_features, or what encode_volumes gave"
            )
        if inputs_embeds is None:
            return Mu2ModelOutput(visual_tokens=tokens, selection=selection)
        if tokens is not None:
            if input_ids is None:
                raise UserError("visual tokens need input_ids to find their placeholders; inputs_embeds has none")
            tokens = _serve(tokens, len(input_ids), "sequences", tile_scans)
            inputs_embeds = self._insert(inputs_embeds, input_ids, tokens.to(inputs_embeds.dtype))
        if right_padded:
            attention_mask = None
        if inputs_embeds.is_meta:  # transformers looks into a 2-D mask to choose a kernel; here is nothing to see
            attention_mask = inputs_embeds.new_zeros(len(inputs_embeds), 1, *[inputs_embeds.shape[1]] * 2)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return Mu2ModelOutput(**outputs, visual_tokens=tokens, selection=selection)

    def embed_prompt(self, input_ids: Tensor, tokens: Tensor) -> Tensor:
        """(R, L) with placeholders and their scans' tokens (R, n, hidden) → what the language model takes (R, L, …)."""
        return self._insert(self.get_input_embeddings()(input_ids), input_ids, tokens)

    def _insert(self, embeds: Tensor, input_ids: Tensor, tokens: Tensor) -> Tensor:
        tokens = tokens.to(embeds.dtype)
        count = tokens.shape[1]
        if not self.config.placeholder_aligned:
            return torch.cat([embeds[:, :1], tokens, embeds[:, count + 1 :]], dim=1)
        here = input_ids == self.config.volume_token_id
        found = here.sum(1)
        if self._looks_at(here) and bool((found != count).any()):
            raise UserError(
                f"a text has {sorted(set(found.tolist()))} volume placeholders, the scan has {count} visual tokens: "
                "build the text with Mu2Processor"
            )
        return embeds.masked_scatter(here[..., None], tokens)

    def _looks_at(self, x: Tensor) -> bool:
        """Whether values are checked: where there are any, and no training step waits for a GPU to tell them."""
        return not (shapes_only(x) or (self.training and x.device.type != "cpu"))

    def _check_volumes(self, volumes: Tensor) -> None:
        vision = self.config.vision
        expected = (vision.channels, *vision.chunk_shape)
        most = self.config.tokenizer.chunks
        if volumes.dim() != 6 or tuple(volumes.shape[2:]) != expected or volumes.shape[1] > most:
            raise UserError(
                f"volumes of shape {tuple(volumes.shape)}; expected (scans, up to {most} chunks, "
                f"{', '.join(map(str, expected))}): prepare the scan by the checkpoint's spec"
            )


class Mu2ForConditionalGeneration(Mu2PreTrainedModel, GenerationMixin):
    """The μ²LLM with its language model's head: writes the report.

    A stage may put a head on it as `alignment`, (texts (M, D), visual tokens (B, n, hidden), targets (M, B)) → loss:
    it is called in `forward`, where DDP and FSDP see it.
    """

    alignment: nn.Module | None

    def __init__(self, config: Mu2Config) -> None:
        super().__init__(config)
        self.model = Mu2Model(config)
        self.register_module("alignment", None)
        text = config.text
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=bool(getattr(text, "lm_head_bias", False)))
        self._tied_weights_keys = {
            "lm_head.weight": f"model.language_model.{_embedding_name(self.model.language_model)}"
        }
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def encode_vision(
        self, volumes: Tensor, chunk_mask: Tensor | None = None, full_chunks: int | None = None
    ) -> Tensor:
        """As `Mu2Model.encode_vision`."""
        return self.model.encode_vision(volumes, chunk_mask, full_chunks)

    def encode_volumes(self, *args: Any, **kwargs: Any) -> VisualTokens:
        """As `Mu2Model.encode_volumes`."""
        return self.model.encode_volumes(*args, **kwargs)

    def finding_probabilities(
        self, vision_features: Tensor, chunk_mask: Tensor | None = None
    ) -> list[dict[str, float]] | None:
        """vision_features (B, T, n, vision width), chunk_mask (B, T) → of each scan how likely each finding is by the
        diagnostic prior, to four places; None without one."""
        if self.model.prior is None:
            return None
        rows = self.model.prior.probabilities(vision_features, chunk_mask).tolist()
        return [{name: round(p, 4) for name, p in zip(self.config.findings, row, strict=True)} for row in rows]

    def freeze_vision(self) -> None:
        """The vision encoder is trained no more, nor do its running statistics move; the projector behind it is."""
        self.model.vision.freeze()

    def freeze_statistics(self) -> None:
        """No running statistic moves any more, whatever is trained: that of a policy must stay its reference's."""
        freeze_statistics(self)

    def freeze_language_model(self) -> None:
        """The language model and its head are trained no more; what reads the scan for it is."""
        self.model.language_model.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        volumes: Tensor | None = None,
        vision_features: Tensor | None = None,
        visual_tokens: Tensor | VisualTokens | None = None,
        chunk_mask: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        tile_scans: bool = False,
        return_selection: bool = False,
        text_embeddings: Tensor | None = None,
        targets: Tensor | None = None,
        **kwargs: Any,
    ) -> Mu2CausalLMOutput:
        """`Mu2Model.forward`'s arguments → logits (R, L, vocabulary), and with `labels` (R, L) the loss.

        Labels are −100 where there is no loss; they are shifted here; the loss is their mean, or their sum over
        `num_items_in_batch`. `logits_to_keep`: of the last so many positions, or of these indices; 0 is all.
        `skip_logits`: none at all; so it is where nothing is said and the model trains with labels, as the loss needs
        only those of the answers, in pieces. Without input_ids and inputs_embeds there are visual tokens alone.
        text_embeddings (M, D) and targets (M, B) go to the head `alignment`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            volumes=volumes,
            vision_features=vision_features,
            visual_tokens=visual_tokens,
            chunk_mask=chunk_mask,
            question_ids=question_ids,
            question_mask=question_mask,
            tile_scans=tile_scans,
            return_selection=return_selection,
            return_dict=True,
            **kwargs,
        )
        alignment = None
        if self.alignment is not None and text_embeddings is not None:
            read = outputs.visual_tokens[:, : self.config.tokenizer.queries]  # not what a prior tells
            alignment = self.alignment(text_embeddings, read, targets)
        if outputs.last_hidden_state is None:
            return Mu2CausalLMOutput(
                visual_tokens=outputs.visual_tokens, selection=outputs.selection, alignment=alignment
            )
        loss = logits = None
        if labels is not None:
            total = -next_token_logps(outputs.last_hidden_state, labels, self.lm_head).sum()
            loss = total / ((labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        if not (self.training and labels is not None if skip_logits is None else skip_logits):
            last = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, last])
        return Mu2CausalLMOutput(
            loss=loss,
            alignment=alignment,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_tokens=outputs.visual_tokens,
            selection=outputs.selection,
        )

    @torch.no_grad()
    def selection_metrics(
        self,
        volumes: Tensor | None = None,
        vision_features: Tensor | None = None,
        chunk_mask: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        **_: Any,
    ) -> dict[str, float]:
        """`selection_entropy` and `selection_similarity` of the first scan of a batch: near 1 they tell a collapse.

        In evaluation mode, so that no running statistic moves; the mode is put back.
        """
        first = [None if x is None else x[:1] for x in (volumes, chunk_mask, question_ids, question_mask)]
        features = None if vision_features is None else vision_features[:1]
        before = self.training
        self.eval()
        try:
            visual = self.encode_volumes(*first, vision_features=features, return_selection=True)
        finally:
            self.train(before)
        assert visual.entropy is not None and visual.similarity is not None
        return {"selection_entropy": float(visual.entropy), "selection_similarity": float(visual.similarity)}

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        volumes: Tensor | None = None,
        vision_features: Tensor | None = None,
        visual_tokens: Tensor | VisualTokens | None = None,
        chunk_mask: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; each scan is encoded once, however many sequences it serves."""
        input_ids = kwargs.pop("input_ids", inputs)
        if visual_tokens is None and (volumes is not None or vision_features is not None):
            visual_tokens = self.encode_volumes(volumes, chunk_mask, question_ids, question_mask, vision_features)
        tokens = visual_tokens.tokens if isinstance(visual_tokens, VisualTokens) else visual_tokens
        if tokens is not None:
            kwargs["visual_tokens"] = _serve(tokens, len(input_ids), "sequences")
        return super().generate(input_ids=input_ids, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        model_inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc, arg-type]
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            model_inputs.pop("visual_tokens", None)  # they are in the cache
        return model_inputs


def _serve(x: Tensor, rows: int, what: str, tile: bool = False) -> Tensor:
    """B rows for k·B: each repeated k times in place, or all of them k times over; UserError for another number."""
    if rows % len(x):
        raise UserError(f"{len(x)} scans cannot serve {rows} {what}: give a multiple of {len(x)}")
    if rows == len(x):
        return x
    times = rows // len(x)
    return x.repeat(times, *[1] * (x.dim() - 1)) if tile else x.repeat_interleave(times, dim=0)


def _embedding_name(language_model: PreTrainedModel) -> str:
    table = language_model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in language_model.named_modules() if module is table)

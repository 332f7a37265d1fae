"""A fresh μ²LLM from a ModelConfig and a spec; checkpoints opened; LoRA put on and merged."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from mu2llm import storage, weights
from mu2llm.errors import UserError
from mu2llm.model import published
from mu2llm.model.configuration import Mu2Config, Mu2ContrastiveConfig, Mu2TokenizerConfig, Mu2VisionConfig
from mu2llm.model.contrastive import Mu2ForContrastive
from mu2llm.model.initialisation import initialise
from mu2llm.model.modeling import Mu2ForConditionalGeneration
from mu2llm.model.prior import name_ids
from mu2llm.model.processing import PLAIN_TEMPLATE, VOLUME_TOKEN, Mu2Processor
from mu2llm.model.text_pooling import HEADS
from mu2llm.model.towers import loading
from mu2llm.model.vision import VisionEncoder
from mu2llm.records import Checkpoint, PreprocessSpec
from mu2llm.settings.model import LoraSettings, ModelConfig
from mu2llm.settings.stages import ContrastiveConfig

logger = logging.getLogger(__name__)
_SMALL_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build(
    model: ModelConfig, spec: PreprocessSpec, texts: Sequence[str] | None = None, seed: int = 0
) -> tuple[Mu2ForConditionalGeneration, Mu2Processor]:
    """A fresh model and its processor; `texts` train the tokenizer of the language model `small`.

    Raises UserError where sizes do not fit each other or the language model cannot be had.
    """
    set_seed(seed)
    if model.language_model == "small":
        backbone, tokenizer = _small(model, texts)
    else:
        backbone, tokenizer = weights.language_model(model.language_model)
        _add_volume_token(backbone, tokenizer)
    text_config = copy.deepcopy(backbone.config)  # ours is adjusted where the two are put together
    config = configuration(model, spec, text_config, int(tokenizer.convert_tokens_to_ids(VOLUME_TOKEN)))  # type: ignore[arg-type]
    whole = _around(backbone, config)
    if model.vision.weights:
        load_vision(whole, model.vision.weights)
    if model.tokenizer.weights:
        load_tokenizer(whole, tokenizer, model.tokenizer.weights)
    return whole, processor_for(config, spec, tokenizer)


def build_processor(model: ModelConfig, spec: PreprocessSpec, texts: Sequence[str] | None = None) -> Mu2Processor:
    """The processor of such a model, without its weights; errors are those of `build`."""
    if model.language_model == "small":
        tokenizer = _small_tokenizer(model, texts)
    else:
        tokenizer = _with_volume_token(weights.tokenizer(model.language_model))
    return _processor(tokenizer, spec, model.tokenizer.visual_tokens, model.max_text_tokens, VOLUME_TOKEN)


def configuration(model: ModelConfig, spec: PreprocessSpec, text_config: Any, volume_token_id: int = 0) -> Mu2Config:
    """The transformers configuration that a user's settings mean for scans of a spec."""
    try:
        vision = vision_configuration(model, spec)
        return Mu2Config(
            vision_config=vision,
            tokenizer_config=tokenizer_configuration(model, spec, vision, text_config.hidden_size),
            text_config=text_config,
            volume_token_id=volume_token_id,
            placeholder_aligned=model.placeholder_aligned,
            max_text_tokens=model.max_text_tokens,
            spec=spec.model_dump(mode="json"),
        )
    except ValueError as error:
        raise UserError(f"model: {str(error).splitlines()[-1].strip()}") from error


def vision_configuration(model: ModelConfig, spec: PreprocessSpec) -> Mu2VisionConfig:
    """The vision encoder's configuration for chunks (C, K, H, W) of the spec; ValueError where sizes do not divide."""
    chunks, channels, *chunk = spec.shape
    settings = model.vision.model_dump(exclude={"weights", "sizes"})
    return Mu2VisionConfig(
        chunks=chunks,
        channels=channels,
        chunk_shape=tuple(chunk),
        tiles=spec.tiles,
        sizes=model.vision.sizes or None,
        **settings,
    )


def tokenizer_configuration(
    model: ModelConfig, spec: PreprocessSpec, vision: Mu2VisionConfig, width: int
) -> Mu2TokenizerConfig:
    """The μ²Tokenizer's, for a language model of that `width`; ValueError where sizes do not divide."""
    own = model.tokenizer.width or width
    return Mu2TokenizerConfig(
        hidden_size=own,
        language_size=None if own == width else width,
        chunks=vision.chunks,
        series=spec.series,
        grid=vision.pooled_grid,
        **model.tokenizer.model_dump(exclude={"width", "weights", "prior", "prior_names"}),
    )


def contrastive_configuration(
    model: ModelConfig, spec: PreprocessSpec, settings: ContrastiveConfig, text_width: int, texts: Any = None
) -> Mu2ContrastiveConfig:
    """Of a vision encoder under a contrastive head; `texts` is the configuration of a text encoder that is trained."""
    vision = vision_configuration(model, spec)
    sizes: dict[str, Any] = {"hidden_size": vision.hidden_size, "chunks": vision.chunks, "grid": vision.pooled_grid}
    sizes |= {"series": spec.series, "text_width": text_width, "num_heads": HEADS}
    plain = spec.model_dump(mode="json")
    return Mu2ContrastiveConfig(vision_config=vision, text_config=texts, spec=plain, loss=settings.loss, **sizes)


def processor_for(
    config: Mu2Config, spec: PreprocessSpec, tokenizer: PreTrainedTokenizerBase, volume_token: str = VOLUME_TOKEN
) -> Mu2Processor:
    """The processor of a model: its spec, its number of visual tokens, and its tokenizer's chat template (a plain one
    where it has none)."""
    return _processor(tokenizer, spec, config.visual_tokens, config.max_text_tokens, volume_token)


def _processor(
    tokenizer: PreTrainedTokenizerBase, spec: PreprocessSpec, queries: int, max_text_tokens: int, volume_token: str
) -> Mu2Processor:
    return Mu2Processor(
        tokenizer,
        chat_template=tokenizer.chat_template or PLAIN_TEMPLATE,
        preprocess=spec.model_dump(mode="json"),
        queries=queries,
        max_text_tokens=max_text_tokens,
        volume_token=volume_token,
    )


def build_contrastive(
    model: ModelConfig,
    spec: PreprocessSpec,
    settings: ContrastiveConfig,
    text_width: int,
    parent: str | None = None,
    seed: int = 0,
    text_encoder: weights.TextEncoder | None = None,
) -> Mu2ForContrastive:
    """The vision encoder of such a model under a contrastive head; `parent` is a checkpoint to start from.

    A `text_encoder` becomes part of the model and is trained with it.
    """
    set_seed(seed)
    texts = copy.deepcopy(text_encoder.model.config) if text_encoder else None
    whole = Mu2ForContrastive(contrastive_configuration(model, spec, settings, text_width, texts))
    if text_encoder:
        whole.text_encoder = text_encoder.model.requires_grad_(True)
        if getattr(whole.text_encoder, "pooler", None) is not None:
            whole.text_encoder.pooler.requires_grad_(False)  # the mean over tokens passes it by
    start = parent or model.vision.weights
    if start:
        load_vision(whole, start)
    return whole


def load(uri: str, dtype: torch.dtype | None = None) -> tuple[Mu2ForConditionalGeneration, Mu2Processor]:
    """A checkpoint's model, in evaluation mode on the CPU, and its processor.

    In the checkpoint's own dtype, or in `dtype`, running statistics too: training starts from fp32 whatever the
    checkpoint was saved in (autocast makes bf16 of it), as a step of AdamW is mostly smaller than one of bf16.
    Raises UserError where it writes no reports, or its processor writes other prompts than it was trained on.
    """
    with storage.local_copy(uri) as folder:
        processor = _read_processor(folder, uri)
        _check_prompt(uri, folder, processor)
        return Mu2ForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto").eval(), processor


TEXT_ENCODER = "text_encoder"
"""Below a contrastive checkpoint: its text encoder's words, and the encoder where no name finds it again."""


def save_text_encoder(encoder: weights.TextEncoder, folder: str, trained: bool, name: str) -> None:
    """Beside a contrastive model what embeds its texts: nothing of an encoder that `name` finds again."""
    if trained or name == "small":
        encoder.tokenizer.save_pretrained(str(Path(folder) / TEXT_ENCODER))
    if name == "small" and not trained:
        encoder.model.save_pretrained(str(Path(folder) / TEXT_ENCODER))


def load_contrastive(uri: str) -> tuple[Mu2ForContrastive, weights.TextEncoder | None]:
    """A contrastive checkpoint's model, in fp32 on the CPU, and the encoder of its texts: `model.whiten(encoder.embed(
    texts))` is what its head reads. No encoder with a checkpoint of before its whitening was kept.

    Raises UserError where it is of another stage or the encoder cannot be had.
    """
    with storage.local_copy(uri) as folder:
        description = json.loads((folder / Checkpoint.FILE).read_text())
        if description["lineage"]["stage"] != "contrastive":
            raise UserError(f"{uri} is a checkpoint of {description['lineage']['stage']}: give one of contrastive")
        model = Mu2ForContrastive.from_pretrained(folder, dtype=torch.float32).eval()
        if model.whitening is None and model.text_encoder is None:
            return model, None
        own = folder / TEXT_ENCODER
        if not own.is_dir():
            return model, weights.text_encoder(description["experiment"]["model"]["text_encoder"])
        encoder = model.text_encoder or AutoModel.from_pretrained(own)
        return model, weights.TextEncoder(encoder, AutoTokenizer.from_pretrained(own))


def _check_prompt(uri: str, folder: Path, processor: Mu2Processor) -> None:
    description = folder / Checkpoint.FILE
    trained = json.loads(description.read_text())["lineage"].get("prompt") if description.is_file() else None
    if trained and trained != processor.prompt_hash:
        raise UserError(
            f"{uri} was trained on prompts of {trained}, its processor now writes {processor.prompt_hash}: its chat "
            "template, tokenizer or transformers' reading of them has changed; put back the files it was saved with"
        )


def load_processor(uri: str) -> Mu2Processor:
    """A checkpoint's processor."""
    with storage.local_copy(uri) as folder:
        return _read_processor(folder, uri)


def _read_processor(folder: Path, uri: str) -> Mu2Processor:
    return Mu2Processor.from_pretrained(_whole(folder, uri))


def _whole(folder: Path, uri: str) -> Path:
    """The folder, if a checkpoint with a language model is in it."""
    if not (folder / "processor_config.json").is_file():
        raise UserError(f"{uri} has no language model: it is no checkpoint of sft, dpo or convert")
    return folder


def load_vision(model: Mu2ForConditionalGeneration | Mu2ForContrastive, uri: str) -> None:
    """The vision encoder from a checkpoint of ours, of any stage, or from its tower's published weights: by path, s3://
    or hub name.

    Raises UserError where something is missing, left over, or of another shape.
    """
    target = model.vision if isinstance(model, Mu2ForContrastive) else model.model.vision
    with weights.place(uri) as path:
        if _is_ours(path):
            tensors = {name.removeprefix("model."): tensor for name, tensor in published.read_tensors(path).items()}
            weights_ = {n.removeprefix("vision."): t for n, t in tensors.items() if n.startswith("vision.")}
        elif target.config.tower == "m3d":
            weights_ = published.vision_weights(published.read_tensors(path), target)
        else:
            weights_ = loading.find(target.config.tower, path).tensors
    report = published.differences(target, weights_)
    if report["missing"] or report["unused"]:
        first = (report["missing"] or report["unused"])[0]
        text_space = first.startswith(("tower.projector", "tower.pooler"))
        hint = "; without its projector it is model.vision.sizes={projection: 0}" if text_space else ""
        raise UserError(f"{uri}: its vision encoder does not fit this model's settings, such as {first}{hint}")
    target.load_state_dict(weights_)


def _is_ours(path: Path) -> bool:
    """Whether a folder is one that our models were saved to."""
    config = path / "config.json"
    return config.is_file() and str(json.loads(config.read_text()).get("model_type")).startswith("mu2llm")


def load_tokenizer(model: Mu2ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, uri: str) -> None:
    """Vision, projector, μ²Tokenizer and prior from a checkpoint that writes reports, whatever its language model was.

    What is between the μ²Tokenizer and a language model, the maps and the scale, is not taken: it stays fresh. What is
    taken, fresh and left there is logged. Raises UserError where else something is missing, or of another shape.
    """
    bridge = "mu2_tokenizer.bridge."
    with storage.local_copy(uri) as path:
        tensors = {name.removeprefix("model."): t for name, t in published.read_tensors(_whole(path, uri)).items()}
        theirs = Mu2Config.from_pretrained(path)
    if theirs.findings:
        ids = name_ids(theirs.findings, tokenizer)  # in this language model's words
        model.model.put_prior(theirs.findings, theirs.finding_head or {}, theirs.finding_names, ids)
    parts = nn.ModuleDict(_reading(model))
    taken = {n: t for n, t in tensors.items() if n.split(".")[0] in parts and not n.startswith(bridge)}
    report = published.differences(parts, taken)
    fresh = [name for name in report["missing"] if name.startswith(bridge)]
    wrong = [name for name in report["missing"] if name not in fresh] or report["unused"]
    if wrong:
        raise UserError(
            f"{uri}: its vision and μ²Tokenizer do not fit this model's settings, such as {wrong[0]}; set model.vision "
            "and model.tokenizer as they are there, with model.tokenizer.width the width of its μ²Tokenizer"
        )
    parts.load_state_dict(taken, strict=False)
    logger.info(
        "%s: %d tensors of vision, projector and μ²Tokenizer taken; fresh: %s; left there: %d, of its language model",
        *(uri, len(taken), ", ".join(fresh) or "none", len(tensors) - len(taken)),
    )


def add_prior(
    model: Mu2ForConditionalGeneration, processor: Mu2Processor, uri: str, findings: Sequence[str], names: int = 0
) -> None:
    """Puts a diagnostic prior of these findings on a model, with the head of the contrastive checkpoint at the URI.

    Raises UserError where that is of another stage or vision, or kept nothing to embed texts by.
    """
    trained, encoder = load_contrastive(uri)
    if encoder is None:
        raise UserError(f"{uri} is of before texts' whitening was kept with it: train contrast again for a prior")
    if trained.config.hidden_size != model.config.vision.hidden_size:
        wide = model.config.vision.hidden_size
        raise UserError(f"{uri}: its vision is {trained.config.hidden_size} wide, {wide} here")
    texts = trained.whiten(encoder.embed(list(findings)))
    prior = model.model.put_prior(findings, trained.config.head, names, name_ids(findings, processor.tokenizer))
    prior.head.load_state_dict(trained.head.state_dict())
    prior.texts.copy_(texts)
    processor.queries = model.config.visual_tokens


def _reading(model: Mu2ForConditionalGeneration) -> dict[str, nn.Module]:
    """The parts that read the scan for the language model."""
    parts = {name: getattr(model.model, name) for name in ("vision", "projector", "mu2_tokenizer", "prior")}
    return {name: part for name, part in parts.items() if part is not None}


def add_lora(model: Mu2ForConditionalGeneration, settings: LoraSettings, also: Sequence[str] = ()) -> PeftModel:
    """LoRA on the language model's linear layers; what else was to be trained still is, in full.

    `also` are modules that a stage has put on the model and trains with it.
    """
    trained = [name for name, part in _reading(model).items() if any(p.requires_grad for p in part.parameters())]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_linear_layers(model.model.language_model),
        modules_to_save=[*trained, *also] or None,
    )
    return get_peft_model(model, config)


def load_lora(model: Mu2ForConditionalGeneration, folder: str) -> PeftModel:
    """The model with the adapter, and whatever was trained in full, of an intermediate checkpoint."""
    return PeftModel.from_pretrained(model, folder)


def merge_lora(model: Any) -> Mu2ForConditionalGeneration:
    """The plain model with the adapter's weights in it; a model without one as it is."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _linear_layers(language_model: PreTrainedModel) -> list[str]:
    names = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    return [f"model.language_model.{name}" for name in names]


def _small_tokenizer(model: ModelConfig, texts: Sequence[str] | None) -> PreTrainedTokenizerBase:
    """A byte-level BPE learnt from the texts."""
    if not texts:
        raise UserError("language model 'small' learns its tokenizer from the reports: there are none")
    special = [VOLUME_TOKEN, "<user>", "<assistant>", "<system>"]
    tokenizer = weights.train_tokenizer(texts, model.small.vocabulary, special)
    tokenizer.chat_template = _SMALL_TEMPLATE
    return tokenizer


def _small(model: ModelConfig, texts: Sequence[str] | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama from scratch, and its tokenizer."""
    tokenizer = _small_tokenizer(model, texts)
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return AutoModelForCausalLM.from_config(small_configuration(model, len(tokenizer), **tokens)), tokenizer


def small_configuration(model: ModelConfig, vocabulary: int, **tokens: Any) -> LlamaConfig:
    """Of the language model `small`, with the ids of its special `tokens`."""
    small = model.small
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=small.hidden_size,
        intermediate_size=small.mlp_dim,
        num_hidden_layers=small.num_layers,
        num_attention_heads=small.num_heads,
        num_key_value_heads=small.num_heads,
        max_position_embeddings=model.max_text_tokens + model.tokenizer.visual_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        **tokens,
    )


def _with_volume_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With the placeholder; one without padding pads with its end."""
    tokenizer.add_special_tokens({"extra_special_tokens": [VOLUME_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _add_volume_token(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The placeholder gets an id, and with all else that the backbone has no row for, the mean embedding, also where
    the table has spare rows."""
    trained = min(len(tokenizer), int(backbone.get_input_embeddings().num_embeddings))  # type: ignore[arg-type]
    _with_volume_token(tokenizer)
    if len(tokenizer) > int(backbone.get_input_embeddings().num_embeddings):  # type: ignore[arg-type]
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in {backbone.get_input_embeddings().weight, backbone.get_output_embeddings().weight}:
            table[trained : len(tokenizer)] = table[:trained].mean(0)


def _around(backbone: PreTrainedModel, config: Mu2Config) -> Mu2ForConditionalGeneration:
    """The backbone's own weights, without a copy, and ours fresh; its head must be a plain linear layer."""
    with torch.no_grad():
        ids = torch.arange(2)[None]
        plain = backbone.get_output_embeddings()(backbone.base_model(input_ids=ids).last_hidden_state)
        if not torch.allclose(plain, backbone(input_ids=ids).logits, atol=1e-3):
            kind = backbone.config.model_type
            raise UserError(f"language model {kind} changes its logits behind the head; only a linear head will do")
    with torch.device("meta"):
        whole = Mu2ForConditionalGeneration(config)
    whole.model.language_model, whole.lm_head = backbone.base_model, backbone.get_output_embeddings()
    fresh = [whole.model.vision, whole.model.projector, whole.model.mu2_tokenizer]
    if config.vision.tower != "m3d":  # others come with their values
        whole.model.vision = VisionEncoder(config.vision)
        fresh.pop(0)
    for part in fresh:
        part.to_empty(device="cpu").apply(initialise)
    bridge = whole.model.mu2_tokenizer.bridge
    if bridge is not None and bridge.norm is not None:
        bridge.norm.measure(backbone.get_input_embeddings().weight)  # type: ignore[arg-type]
    whole.tie_weights()
    whole.generation_config.eos_token_id = backbone.generation_config.eos_token_id
    whole.generation_config.pad_token_id = backbone.generation_config.pad_token_id
    return whole

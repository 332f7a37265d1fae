"""Published checkpoints (u2Tokenizer's layout) → ours, and published modules by their constructor's arguments.

A key that is missing or left over is reported, and nothing is written.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from mu2llm import ct, storage
from mu2llm.artefacts import publish
from mu2llm.config import Experiment
from mu2llm.errors import Failure, UserError
from mu2llm.model import published
from mu2llm.model.building import configuration, processor_for
from mu2llm.model.configuration import Mu2TokenizerConfig, Mu2VisionConfig
from mu2llm.model.modeling import Mu2ForConditionalGeneration
from mu2llm.model.mu2_tokenizer import Mu2Tokenizer
from mu2llm.model.published import PROJECTOR, VISION, below, differences, read_tensors, rename, without_effect
from mu2llm.model.vision import Projector, VisionTower, pool_patches
from mu2llm.records import Checkpoint, Lineage
from mu2llm.settings.data import DataConfig
from mu2llm.settings.model import ModelConfig

PLACEHOLDER = "<im_patch>"
_TEXT_TYPES = ("llama", "qwen3", "qwen2", "phi3", "phi")
_NEEDED = ("model_type", "image_size", "patch_size", "u2t_num_layers", "u2t_num_heads", "num_3d_query_token")
_OWN_KEYS = re.compile(
    r"^(u2t_|proj_|mm_|vision_|image_|enable_|seg)|^(patch_size|num_3d_query_token|use_multi_scale|attn_type|auto_map)$"
)


class ReferenceTokenizer(nn.Module):
    """`(visual (B, chunks, tokens, E), text (B, L, E)) -> tokens (B, queries, E)`.

    Computes in float64, as the known answers were: without norms between its layers, the published tokenizer
    magnifies float32's rounding to 1e-3. Gives back the dtype of `visual`.
    """

    def __init__(self, tokenizer: Mu2Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer.double()

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        return cast(Tensor, self.tokenizer(visual.double(), text.double()).tokens).to(visual.dtype)


def load_reference_tokenizer(weights: Mapping[str, Tensor], **arguments: Any) -> ReferenceTokenizer:
    """The published μ²Tokenizer by its constructor's arguments.

    Raises Failure where keys are missing or left over.
    """
    config = reference_tokenizer_config(**arguments)
    tokenizer = Mu2Tokenizer(config)
    published.load(tokenizer, rename(weights, published.tokenizer_rules(config), tokenizer))
    return ReferenceTokenizer(tokenizer).eval()


class ReferenceVision(nn.Module):
    """`volume` (B, C, K, H, W) → (tower's output with the class token first, projected patches), in float64."""

    def __init__(self, config: Mu2VisionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.tower = VisionTower(config)
        self.projector = Projector(config, width)

    def forward(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        vision = self.tower(volume.double())
        patches = vision[:, 1:] if self.config.class_token else vision
        return vision.to(volume.dtype), self.projector(pool_patches(patches, self.config)).to(volume.dtype)


def load_reference_vision(
    weights: Mapping[str, Tensor], *, projector_out: int, layers: int, img_size: Any, **arguments: Any
) -> ReferenceVision:
    """The published vision tower (`vision.…`) and projector (`projector.…`) by their arguments → a module.

    Raises Failure where keys are missing or left over.
    """
    config = Mu2VisionConfig(chunk_shape=tuple(img_size), projector_layers=layers, **arguments)
    module = ReferenceVision(config, projector_out)
    rules = below("vision.", "", VISION) + below("projector.", "", PROJECTOR)
    published.load(module, rename(weights, rules, module))
    return module.double().eval()


def reference_tokenizer_config(
    *,
    embed_size: int,
    num_heads: int,
    num_layers: int,
    top_k: int,
    num_3d_query_token: int,
    hidden_size: int,
    attn_type: str = "rma",
    enable_diffts: bool = False,
    enable_dmtp: bool = False,
    use_multi_scale: bool = True,
) -> Mu2TokenizerConfig:
    """The published constructor's arguments as our fields, with every mend off."""
    if embed_size != hidden_size:
        raise UserError(f"embed_size {embed_size} and hidden_size {hidden_size} must be equal")
    return Mu2TokenizerConfig(
        hidden_size=embed_size,
        num_heads=num_heads,
        num_layers=num_layers,
        top_k=top_k,
        queries=num_3d_query_token,
        **_choices(attn_type, enable_diffts, enable_dmtp, use_multi_scale),
        residual=False,
        positions=False,
        normalise_scores=False,
        straight_through=False,
        mask_padding=False,
    )


def _choices(attn_type: str, enable_diffts: bool, enable_dmtp: bool, use_multi_scale: bool) -> dict[str, Any]:
    attention = {"rma": "relative_1d", "rope": "rotary_1d"}.get(attn_type, "absolute")
    return {
        "attention": attention,
        "batch_first": attention != "absolute",
        "selection": "differentiable" if enable_diffts else "top_k",
        "pooling": "dynamic" if enable_dmtp and use_multi_scale else "static",
        "scales": (1, 2, 4) if use_multi_scale else (1,),
    }


def convert_reference(directory: str, out: str) -> dict[str, Any]:
    """A published checkpoint's folder → a checkpoint of ours at `out`: {checkpoint, missing, unused, dropped}.

    `dropped` are weights without effect. Raises UserError where the folder is not of that layout, Failure (naming
    the keys) where keys are missing or left over; then nothing is written.
    """
    with storage.local_copy(directory) as folder:
        return _convert(directory, folder, out)


def _convert(directory: str, folder: Path, out: str) -> dict[str, Any]:
    settings = _read_config(folder)
    tensors = read_tensors(folder)
    model_settings, spec = _model_settings(settings, tensors), _spec(settings)
    tokenizer = _tokenizer(folder)
    placeholder = int(tokenizer.convert_tokens_to_ids(PLACEHOLDER))  # type: ignore[arg-type]
    config = configuration(model_settings, spec, _text_config(settings, tensors), placeholder)
    with torch.device("meta"):
        model = Mu2ForConditionalGeneration(config)
    rules = published.model_rules(config.tokenizer)
    renamed = rename(tensors, rules, model)
    if config.tie_word_embeddings:
        renamed.setdefault("lm_head.weight", renamed["model.language_model.embed_tokens.weight"])
    report = differences(model, renamed)
    if report["missing"] or report["unused"]:
        missing = sorted(published.names(own_names(model), rules) - set(tensors)) or report["missing"]
        unused = published.sources(tensors, rules, report["unused"])
        raise Failure(f"{directory} does not convert: missing {missing}, unused {unused}")
    whole = Mu2ForConditionalGeneration.from_pretrained(None, config=config, state_dict=renamed, dtype=_dtype(renamed))
    if (folder / "generation_config.json").is_file():
        whole.generation_config = GenerationConfig.from_pretrained(folder)
    experiment = Experiment(name="converted", data=DataConfig(spec=spec), model=model_settings)
    _publish(whole, _raw_processor(config, spec, tokenizer), experiment, out)
    return {"checkpoint": out, **report, "dropped": sorted(n for n in tensors if without_effect(n, whole))}


def own_names(model: Mu2ForConditionalGeneration) -> list[str]:
    """Of the weights that a checkpoint must hold: a tied head has none of its own."""
    return [name for name in model.state_dict() if not (model.config.tie_word_embeddings and name == "lm_head.weight")]


def _dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    return weights["model.language_model.embed_tokens.weight"].dtype


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, read beside its config.json, which names classes that are not transformers' own."""
    with tempfile.TemporaryDirectory() as alone:
        for pattern in ("*token*", "vocab*", "merges.txt", "chat_template*"):
            for file in folder.glob(pattern):
                shutil.copy(file, alone)
        tokenizer = AutoTokenizer.from_pretrained(alone)
    if tokenizer.convert_tokens_to_ids(PLACEHOLDER) in (None, tokenizer.unk_token_id):
        raise UserError(f"{folder}: its tokenizer has no {PLACEHOLDER}; is it a published μ²LLM?")
    return cast(PreTrainedTokenizerBase, tokenizer)


def _publish(model: Mu2ForConditionalGeneration, processor: Any, experiment: Experiment, out: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        checkpoint = Checkpoint(
            uri=out,
            experiment=experiment.model_dump(mode="json"),
            lineage=Lineage(stage="converted", spec_hash=experiment.data.spec.hash, prompt=processor.prompt_hash),
        )
        publish(checkpoint, folder)


def _raw_processor(config: Any, spec: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The published prompt: placeholders and question, nothing else, whatever chat format the backbone has."""
    processor = processor_for(config, spec, tokenizer, volume_token=PLACEHOLDER)
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return processor


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a published checkpoint")
    try:
        published = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if "u2t_top_k" not in published:
        raise UserError(f"{path} has no u2t_top_k: it is not a checkpoint of the published μ²LLM")
    absent = [name for name in _NEEDED if name not in published]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; a published checkpoint has them")
    return dict(published)


def _model_settings(published: dict[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """What the configuration says, and where its keys changed over time, what the weights are."""
    tower = "model.vision_tower.vision_tower"
    mlp = _needed(tensors, f"{tower}.blocks.0.mlp.linear1.weight")
    score = _needed(tensors, "model.u2tokenizer.svt_module.token_selection.score_net.weight")
    names = "\n".join(tensors)
    attention = "rma" if "relative_bias" in names else "mha" if "in_proj_weight" in names else "rope"
    return ModelConfig.model_validate(
        {
            "face": "reference",
            "language_model": published.get("_name_or_path", ""),
            "vision": {
                "hidden_size": mlp.shape[1],
                "mlp_dim": mlp.shape[0],
                "num_layers": len(set(re.findall(rf"{re.escape(tower)}\.blocks\.(\d+)\.", names))),
                "num_heads": max(1, mlp.shape[1] // 64),  # as MONAI's ViT, whose heads have 64 channels
                "patch_size": published["patch_size"],
                "pooling": published.get("proj_pooling_size", 2),
                "projector_layers": published.get("proj_layer_num", 2),
                "true_grid": published["image_size"][0] <= published["image_size"][-1],
            },
            "tokenizer": {
                "num_layers": published["u2t_num_layers"],
                "num_heads": published["u2t_num_heads"],
                "queries": published["num_3d_query_token"],
                "top_k": published["u2t_top_k"],
                **_choices(attention, len(score) > 1, "dynamic_pool" in names, published.get("use_multi_scale", True)),
            },
        }
    )


def _needed(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor whose shape decides the model's sizes."""
    if name not in tensors:
        raise Failure(f"the checkpoint does not convert: missing {[name]}")
    return tensors[name]


def _spec(published: dict[str, Any]) -> Any:
    """The published preprocessing, at the checkpoint's image size."""
    sizes = sorted(published["image_size"])
    spec = ct.SPECS["reference"]
    depth, edge = sizes[0], sizes[-1]
    return spec.model_copy(update={"grid": (depth * spec.chunks, edge, edge)})


def _text_config(published: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    kind = published["model_type"].lower().removeprefix("u2")
    if kind not in _TEXT_TYPES:
        raise UserError(f"backbone {published['model_type']!r} is not known; there are {', '.join(_TEXT_TYPES)}")
    own = {key: value for key, value in published.items() if not _OWN_KEYS.search(key)}
    own.pop("model_type")
    own.pop("architectures", None)
    own["vocab_size"] = len(_needed(tensors, "model.embed_tokens.weight"))
    return AutoConfig.for_model(kind, **own)

"""Published checkpoints (u2Tokenizer's layout, M3D-CLIP's vision tower) → ours, key by key.

Keys of the published code that never reach its output are dropped by name (`WITHOUT_EFFECT`); any other key
that is left over, or missing, is reported and nothing is written.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from mu2llm import ct
from mu2llm.config import DataConfig, Experiment, ModelConfig
from mu2llm.errors import Failure, UserError
from mu2llm.model.building import configuration, processor_for
from mu2llm.model.configuration import Mu2TokenizerConfig, Mu2VisionConfig
from mu2llm.model.modeling import Mu2ForConditionalGeneration
from mu2llm.model.mu2_tokenizer import Mu2Tokenizer
from mu2llm.model.vision import Projector, VisionTower, pool_patches
from mu2llm.records import Checkpoint, Lineage

_ATTENTION = [
    (r"w([qkv])\.(weight|bias)", r"qkv.\2#\1"),
    (r"dense\.", "output."),
    (r"relative_bias", "position.table"),
    (r"in_proj_(weight|bias)", r"qkv.\1"),
    (r"out_proj\.", "output."),
]
_CROSS = [
    (r"wq\.", "query."),
    (r"w([kv])\.(weight|bias)", r"key_value.\2#\1"),
    (r"dense\.", "output."),
]
_TOKENIZER = [
    (r"query_tokens", "queries", []),
    (r"svt_module\.attention_network\.layers\.(\d+)\.(spatial|temporal)_attention\.", r"layers.\1.\2.", _ATTENTION),
    (r"svt_module\.token_selection\.score_net\.", "selection.score.", []),
    (r"svt_module\.dynamic_pool\.gate_fc\.", "pooling.gate.", []),
    (r"tta_module\.layers_vt\.(\d+)\.self_attention\.", r"aggregation_layers.\1.among.", _ATTENTION),
    (r"tta_module\.layers_vt\.(\d+)\.visual_cross_attention\.", r"aggregation_layers.\1.visual.", _CROSS),
    (r"tta_module\.layers_vt\.(\d+)\.text_cross_attention\.", r"aggregation_layers.\1.text.", _CROSS),
    (r"tta_module\.layers_vt\.(\d+)\.norm_self\.", r"aggregation_layers.\1.norm_among.", []),
    (r"tta_module\.layers_vt\.(\d+)\.norm_cross_v\.", r"aggregation_layers.\1.norm_visual.", []),
    (r"tta_module\.layers_vt\.(\d+)\.norm_cross_t\.", r"aggregation_layers.\1.norm_text.", []),
    (r"tta_module\.layer_linagg\.linear_aggregator\.wq\.", "aggregation.query.", []),
    (r"tta_module\.layer_linagg\.linear_aggregator\.wk\.", "aggregation.key.", []),
]
_VISION = [
    (r"patch_embedding\.patch_embeddings\.1\.", "tower.stem.projection.", []),
    (r"patch_embedding\.position_embeddings", "tower.position_embeddings", []),
    (r"(cls_token|norm\.|blocks\.)", r"tower.\1", []),
]
_PROJECTOR = [(r"projector\.", "projector.layers.", [])]
WITHOUT_EFFECT = re.compile(
    r"layer_linagg\.linear_aggregator\.(wv|dense)\.|dynamic_pool\.gate_fc\.bias|norm_cross_attn\.|patch_embedding\.cls_token|rotary_emb\.inv_freq"
)
_TEXT_TYPES = ("llama", "qwen3", "qwen2", "phi3", "phi")
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
    tokenizer = Mu2Tokenizer(reference_tokenizer_config(**arguments))
    _load(tokenizer, rename(weights, _TOKENIZER, tokenizer))
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
    rules = [(rf"vision\.{pattern}", target, inner) for pattern, target, inner in _VISION]
    rules += [(rf"projector\.{pattern}", target, inner) for pattern, target, inner in _PROJECTOR]
    _load(module, rename(weights, rules, module))
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


def rename(weights: Mapping[str, Tensor], rules: list[Any], module: nn.Module) -> dict[str, Tensor]:
    """Published names → ours; q, k and v of one attention become one tensor. What no rule knows keeps its name."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    wanted = module.state_dict().keys()
    for name, tensor in weights.items():
        if WITHOUT_EFFECT.search(name):
            continue
        target = _target(name, rules)
        if target.endswith("selection.score.bias") and target not in wanted:
            continue  # the same for all tokens: a softmax over them does not see it
        whole, separator, part = target.partition("#")
        if separator:
            parts.setdefault(whole, {})[part] = tensor
        else:
            renamed[target] = tensor
    for whole, tensors in parts.items():
        renamed[whole] = torch.cat([tensors[part] for part in sorted(tensors, key="qkv".index)])
    return renamed


def _target(name: str, rules: list[Any]) -> str:
    for pattern, replacement, inner in rules:
        match = re.match(pattern, name)
        if not match:
            continue
        rest = name[match.end() :]
        for inner_pattern, inner_replacement in inner:
            if re.match(inner_pattern, rest):
                rest = re.sub(f"^{inner_pattern}", inner_replacement, rest)
                break
        return match.expand(replacement) + rest
    return name


def _load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    report = differences(module, weights)
    if report["missing"] or report["unused"]:
        raise Failure(f"the weights do not fit: missing {report['missing']}, unused {report['unused']}")
    module.load_state_dict(weights)


def differences(module: nn.Module, weights: dict[str, Tensor]) -> dict[str, list[str]]:
    """Names that the module lacks weights for (`missing`, wrong shapes too) and weights without a place (`unused`)."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{n}: {given[n]}, expected {expected[n]}" for n in expected.keys() & given.keys() if given[n] != expected[n]
    ]
    return {
        "missing": sorted([*(expected.keys() - given.keys()), *wrong]),
        "unused": sorted(given.keys() - expected.keys()),
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder or file of safetensors or torch's .bin; of the latter tensors only, no pickled code."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors")] or [*path.glob("*.bin")])
    files = [file for file in files if file.name not in ("training_args.bin", "optimizer.bin", "scheduler.bin")]
    if not files:
        raise UserError(f"{path} has no *.safetensors and no *.bin")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        else:
            tensors |= torch.load(file, map_location="cpu", weights_only=True)
    return tensors


def convert_reference(directory: str, out: str) -> dict[str, Any]:
    """A published checkpoint's folder → a checkpoint of ours at `out`; {checkpoint, missing, unused, dropped}.

    Raises UserError where the folder is not of that layout, Failure (naming the keys) where keys are missing
    or left over; then nothing is written.
    """
    folder = Path(directory)
    published = _read_config(folder)
    tensors = read_tensors(folder)
    settings = _model_settings(published)
    spec = _spec(published)
    text_config = _text_config(published, tensors)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    placeholder = tokenizer.convert_tokens_to_ids("<im_patch>")
    if placeholder is None or placeholder == tokenizer.unk_token_id:
        raise UserError(f"{directory}: its tokenizer has no <im_patch>; is it a μ²LLM checkpoint?")
    config = configuration(settings, spec, text_config, placeholder)
    with torch.device("meta"):
        model = Mu2ForConditionalGeneration(config)
    renamed = rename(tensors, _whole_rules(), model)
    if config.tie_word_embeddings:
        renamed.setdefault("lm_head.weight", renamed["model.language_model.embed_tokens.weight"])
    report = differences(model, renamed)
    if report["missing"] or report["unused"]:
        raise Failure(f"{directory} does not convert: missing {report['missing']}, unused {report['unused']}")
    model.load_state_dict(renamed, assign=True)
    model.tie_weights()
    _publish(
        model,
        _raw_processor(config, spec, tokenizer),
        Experiment(name="converted", data=DataConfig(spec=spec), model=settings),
        out,
    )
    dropped = sorted(name for name in tensors if WITHOUT_EFFECT.search(name) or name.endswith("score_net.bias"))
    return {"checkpoint": out, **report, "dropped": dropped}


def _publish(model: Mu2ForConditionalGeneration, processor: Any, experiment: Experiment, out: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        Checkpoint(
            uri=out,
            experiment=experiment.model_dump(mode="json"),
            lineage=Lineage(stage="converted", spec_hash=experiment.data.spec.hash),
        ).publish(folder)


def _raw_processor(config: Any, spec: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The published prompt: placeholders and question, nothing else, whatever chat format the backbone has."""
    processor = processor_for(config, spec, tokenizer, volume_token="<im_patch>")
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return processor


def _whole_rules() -> list[Any]:
    rules = [(rf"model\.u2tokenizer\.{pattern}", f"model.mu2_tokenizer.{t}", inner) for pattern, t, inner in _TOKENIZER]
    rules += [(rf"model\.vision_tower\.vision_tower\.{pattern}", f"model.vision.{t}", i) for pattern, t, i in _VISION]
    rules += [(rf"model\.mm_projector\.{pattern}", f"model.{t}", inner) for pattern, t, inner in _PROJECTOR]
    return [*rules, (r"model\.(?!u2tokenizer|vision_tower|mm_projector)", "model.language_model.", [])]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a published checkpoint")
    published = json.loads(path.read_text())
    if "u2t_top_k" not in published:
        raise UserError(f"{path} has no u2t_top_k: it is not a checkpoint of the published μ²LLM")
    return dict(published)


def _model_settings(published: dict[str, Any]) -> ModelConfig:
    patch = tuple(published["patch_size"])
    depth_first = published["image_size"][0] <= published["image_size"][-1]
    attention = published.get("attn_type", "rma" if published.get("enable_rpe", True) else "mha")
    choices = _choices(
        attention,
        published.get("enable_diffts", False),
        published.get("enable_dmtp", False),
        published.get("use_multi_scale", True),
    )
    return ModelConfig.model_validate(
        {
            "face": "reference",
            "language_model": published.get("_name_or_path", ""),
            "vision": {
                "hidden_size": published.get("mm_hidden_size", 768),
                "patch_size": patch,
                "pooling": published.get("proj_pooling_size", 2),
                "projector_layers": published.get("proj_layer_num", 2),
                "true_grid": depth_first,
            },
            "tokenizer": {
                "num_layers": published["u2t_num_layers"],
                "num_heads": published["u2t_num_heads"],
                "queries": published["num_3d_query_token"],
                "top_k": published["u2t_top_k"],
                **choices,
            },
        }
    )


def _spec(published: dict[str, Any]) -> Any:
    """The published preprocessing, at the checkpoint's image size."""
    sizes = sorted(published["image_size"])
    spec = ct.SPECS["reference"]
    depth, edge = sizes[0], sizes[-1]
    return spec.model_copy(update={"grid": (depth * spec.chunks, edge, edge)})


def _text_config(published: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    kind = published["model_type"].lower().removeprefix("u2")
    if kind not in _TEXT_TYPES:
        raise UserError(f"backbone {published['model_type']!r} is not known; there are {', '.join(_TEXT_TYPES)}")
    own = {key: value for key, value in published.items() if not _OWN_KEYS.search(key)}
    own.pop("model_type")
    own.pop("architectures", None)
    own["vocab_size"] = len(tensors["model.embed_tokens.weight"])
    return AutoConfig.for_model(kind, **own)

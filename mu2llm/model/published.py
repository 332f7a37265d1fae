"""Names of the published code's weights and ours (u2Tokenizer's layout, M3D-CLIP's vision tower).

Keys of the published code that never reach its output are dropped by name (`WITHOUT_EFFECT`); what no rule knows
keeps its name, so that it is reported as left over.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mu2llm.errors import Failure, UserError
from mu2llm.model.configuration import Mu2Config, Mu2TokenizerConfig, Mu2VisionConfig

Rules = list[tuple[str, str, list[tuple[str, str]]]]

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
TOKENIZER = [
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
VISION: Rules = [
    (r"patch_embedding\.patch_embeddings\.1\.", "tower.stem.projection.", []),
    (r"patch_embedding\.position_embeddings", "tower.position_embeddings", []),
    (r"(cls_token|norm\.|blocks\.)", r"tower.\1", []),
]
PROJECTOR: Rules = [(r"projector\.", "projector.layers.", [])]
WITHOUT_EFFECT = re.compile(
    r"layer_linagg\.linear_aggregator\.(wv|dense)\.|dynamic_pool\.gate_fc\.bias|norm_cross_attn\."
    r"|patch_embedding\.cls_token|rotary_emb\.inv_freq"
)


def rename(weights: Mapping[str, Tensor], rules: Rules, module: nn.Module) -> dict[str, Tensor]:
    """Published names → those of `module`; q, k and v of one attention become one tensor."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if without_effect(name, module):
            continue
        whole, separator, part = _target(name, rules).partition("#")
        if separator:
            parts.setdefault(whole, {})[part] = tensor
        else:
            renamed[whole] = tensor
    for whole, tensors in parts.items():
        renamed[whole] = torch.cat([tensors[part] for part in sorted(tensors, key="qkv".index)])
    return renamed


def without_effect(name: str, module: nn.Module) -> bool:
    """Whether a published weight never reaches the output: unused there, or the same for all that a softmax sees."""
    if name.endswith("token_selection.score_net.bias"):
        return not any(own.endswith("selection.score.bias") for own in module.state_dict())
    return WITHOUT_EFFECT.search(name) is not None


def load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Into the module; Failure, naming the keys, where any is missing or left over."""
    report = differences(module, weights)
    if report["missing"] or report["unused"]:
        raise Failure(f"the weights do not fit: missing {report['missing']}, unused {report['unused']}")
    module.load_state_dict(weights)


def vision_weights(weights: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """M3D-CLIP's `pretrained_ViT.bin` for a vision encoder; its one channel is shared out where ours has several."""
    renamed = rename({name.removeprefix("module."): t for name, t in weights.items()}, VISION, encoder)
    stem = "tower.stem.projection.weight"
    wanted = encoder.state_dict().get(stem)
    if stem in renamed and wanted is not None and wanted.shape[1] % renamed[stem].shape[1] == 0:
        channels = wanted.shape[1] // renamed[stem].shape[1]
        renamed[stem] = renamed[stem].repeat_interleave(channels, dim=1) / channels
    return renamed


def _target(name: str, rules: Rules) -> str:
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


def sources(weights: Mapping[str, Tensor], rules: Rules, ours: list[str]) -> list[str]:
    """The published names of weights that `rename` puts under any of our names."""
    return sorted(name for name in weights if _target(name, rules).partition("#")[0] in ours)


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


def names(config: Mu2Config, model: nn.Module) -> Iterator[str]:
    """What a published checkpoint of this configuration must hold, by the published code's names."""
    for name in model.state_dict():
        if name.startswith("model.language_model."):
            yield name.replace("language_model.", "", 1)
        elif name.startswith("model.projector."):
            yield name.replace("projector.layers", "mm_projector.projector", 1)
        elif name.startswith("lm_head.") and not config.tie_word_embeddings:
            yield name
    yield from (f"model.vision_tower.vision_tower.{name}" for name in _vision_names(config.vision))
    yield from (f"model.u2tokenizer.{name}" for name in _tokenizer_names(config.tokenizer))


def _vision_names(config: Mu2VisionConfig) -> Iterator[str]:
    yield from ("cls_token", "patch_embedding.position_embeddings")
    yield from _layer("patch_embedding.patch_embeddings.1", "norm")
    for block in (f"blocks.{i}" for i in range(config.num_layers)):
        yield f"{block}.attn.qkv.weight"
        yield from _layer(*(f"{block}.{part}" for part in ("norm1", "norm2", "attn.out_proj")))
        yield from _layer(*(f"{block}.mlp.{part}" for part in ("linear1", "linear2")))


def _tokenizer_names(config: Mu2TokenizerConfig) -> Iterator[str]:
    yield from ("query_tokens", "svt_module.token_selection.score_net.weight")
    if config.pooling == "dynamic":
        yield "svt_module.dynamic_pool.gate_fc.weight"
    for i in range(config.num_layers):
        own, tta = f"svt_module.attention_network.layers.{i}", f"tta_module.layers_vt.{i}"
        for name in (f"{own}.spatial_attention", f"{own}.temporal_attention", f"{tta}.self_attention"):
            if config.attention == "absolute":
                yield from (f"{name}.in_proj_weight", f"{name}.in_proj_bias")
                yield from _layer(f"{name}.out_proj")
                continue
            yield from _layer(*(f"{name}.{part}" for part in ("wq", "wk", "wv", "dense")))
            if config.attention == "relative_1d":
                yield f"{name}.relative_bias"
        for name in (f"{tta}.visual_cross_attention", f"{tta}.text_cross_attention"):
            yield from _layer(*(f"{name}.{part}" for part in ("wq", "wk", "wv", "dense")))
        yield from _layer(*(f"{tta}.norm_{part}" for part in ("self", "cross_v", "cross_t")))
    yield from _layer(*(f"tta_module.layer_linagg.linear_aggregator.{part}" for part in ("wq", "wk")))


def _layer(*names: str) -> Iterator[str]:
    for name in names:
        yield from (f"{name}.weight", f"{name}.bias")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder or file of safetensors or torch's .bin; of the latter tensors only, no pickled code."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors")] or [*path.glob("*.bin")])
    files = [file for file in files if file.name not in ("training_args.bin", "optimizer.bin", "scheduler.bin")]
    if not files:
        raise UserError(f"{path} has no *.safetensors and no *.bin")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_file(file)
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds pickled code, which is not run: it must be tensors alone") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise Failure(f"{file} of {file.stat().st_size} bytes is damaged: {why[0]}; fetch it again") from error

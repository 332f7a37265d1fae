"""Names of the published code's weights and ours (u2Tokenizer's layout, M3D-CLIP's vision tower).

Keys of the published code that never reach its output are dropped by name (`WITHOUT_EFFECT`); what no rule knows
keeps its name, so that it is reported as left over.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mu2llm.errors import Failure, UserError

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
            tensors |= _read_bin(file)
    return tensors


def _read_bin(file: Path) -> dict[str, Tensor]:
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds pickled code, which is not run: it must be tensors alone") from error

"""Names of the published code's weights and ours (u2Tokenizer's layout, M3D-CLIP's vision tower).

Keys of the published code that never reach its output are dropped by name (`WITHOUT_EFFECT`); what no rule knows
keeps its name, so that it is reported as left over.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mu2llm.errors import Failure, UserError
from mu2llm.model.configuration import Mu2TokenizerConfig

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
"""Of files of weights, the first of which there are any being read."""

# (published prefixes, ours): what begins by one of them is ours, what follows staying as it is; several are the parts
# of one tensor of ours, one below the other. `*` is one part of a name between dots, the same on both sides.
Rules = list[tuple[tuple[str, ...], str]]


def below(published: str, ours: str, rules: Rules) -> Rules:
    """The rules for a module that lies below other names on either side."""
    return [(tuple(published + name for name in names), ours + target) for names, target in rules]


_SEPARATE: Rules = [(("wq.", "wk.", "wv."), "qkv."), (("dense.",), "output."), (("relative_bias",), "position.table")]
_TOGETHER: Rules = [(("in_proj_",), "qkv."), (("out_proj.",), "output.")]  # torch's MultiheadAttention
_CROSS: Rules = [(("wq.",), "query."), (("wk.", "wv."), "key_value."), (("dense.",), "output.")]
_LAYER, _OUR_LAYER = "tta_module.layers_vt.*.", "aggregation_layers.*."
VISION: Rules = [
    (("patch_embedding.patch_embeddings.1.",), "tower.stem.projection."),
    (("patch_embedding.position_embeddings",), "tower.position_embeddings"),
    *[((name,), f"tower.{name}") for name in ("cls_token", "norm.", "blocks.")],
]
_CLIP = "vision_encoder."
PROJECTOR: Rules = [(("projector.",), "projector.layers.")]


def tokenizer_rules(config: Mu2TokenizerConfig) -> Rules:
    """The μ²Tokenizer's: its self-attention has projections of other names where it is torch's own (`absolute`)."""
    attention = _TOGETHER if config.attention == "absolute" else _SEPARATE
    return [
        (("query_tokens",), "queries"),
        (("svt_module.token_selection.score_net.",), "selection.score."),
        (("svt_module.dynamic_pool.gate_fc.",), "pooling.gate."),
        *below("svt_module.attention_network.layers.*.spatial_attention.", "layers.*.spatial.", attention),
        *below("svt_module.attention_network.layers.*.temporal_attention.", "layers.*.temporal.", attention),
        *below(f"{_LAYER}self_attention.", f"{_OUR_LAYER}among.", attention),
        *below(f"{_LAYER}visual_cross_attention.", f"{_OUR_LAYER}visual.", _CROSS),
        *below(f"{_LAYER}text_cross_attention.", f"{_OUR_LAYER}text.", _CROSS),
        ((f"{_LAYER}norm_self.",), f"{_OUR_LAYER}norm_among."),
        ((f"{_LAYER}norm_cross_v.",), f"{_OUR_LAYER}norm_visual."),
        ((f"{_LAYER}norm_cross_t.",), f"{_OUR_LAYER}norm_text."),
        (("tta_module.layer_linagg.linear_aggregator.wq.",), "aggregation.query."),
        (("tta_module.layer_linagg.linear_aggregator.wk.",), "aggregation.key."),
    ]


def model_rules(config: Mu2TokenizerConfig) -> Rules:
    """A whole checkpoint's; what is none of the three modules is the language model's."""
    return [
        *below("model.u2tokenizer.", "model.mu2_tokenizer.", tokenizer_rules(config)),
        *below("model.vision_tower.vision_tower.", "model.vision.", VISION),
        *below("model.mm_projector.", "model.", PROJECTOR),
        (("model.",), "model.language_model."),
    ]


WITHOUT_EFFECT = re.compile(
    r"layer_linagg\.linear_aggregator\.(wv|dense)\.|dynamic_pool\.gate_fc\.bias|norm_cross_attn\."
    r"|patch_embedding\.cls_token|rotary_emb\.inv_freq"
)


def rename(weights: Mapping[str, Tensor], rules: Rules, module: nn.Module) -> dict[str, Tensor]:
    """Published names → those of `module`; q, k and v of one attention become one tensor."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        if not without_effect(name, module):
            ours, part = _ours(name, rules)
            parts.setdefault(ours, {})[part] = tensor
    whole = {ours: [each[i] for i in sorted(each)] for ours, each in parts.items()}
    return {ours: torch.cat(each) if len(each) > 1 else each[0] for ours, each in whole.items()}


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
    """M3D-CLIP's `pretrained_ViT.bin`, or its whole CLIP, for a vision encoder; its one channel is shared out where
    ours has several."""
    plain = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    clip = {name.removeprefix(_CLIP): tensor for name, tensor in plain.items() if name.startswith(_CLIP)}
    renamed = rename(clip or plain, VISION, encoder)
    stem = "tower.stem.projection.weight"
    wanted = encoder.state_dict().get(stem)
    if stem in renamed and wanted is not None and wanted.shape[1] % renamed[stem].shape[1] == 0:
        channels = wanted.shape[1] // renamed[stem].shape[1]
        renamed[stem] = renamed[stem].repeat_interleave(channels, dim=1) / channels
    return renamed


def _ours(name: str, rules: Rules) -> tuple[str, int]:
    """Our name of a published one, and which part of the tensor it is; what no rule knows keeps its name."""
    for published, ours in rules:
        for part, prefix in enumerate(published):
            found = _replaced(name, prefix, ours)
            if found:
                return found, part
    return name, 0


def _replaced(name: str, prefix: str, by: str) -> str | None:
    match = re.match(re.escape(prefix).replace(r"\*", "([^.]+)"), name)
    return match and by.replace("*", "{}").format(*match.groups()) + name[match.end() :]


def sources(weights: Mapping[str, Tensor], rules: Rules, ours: list[str]) -> list[str]:
    """The published names of weights that `rename` puts under any of our names."""
    return sorted(name for name in weights if _ours(name, rules)[0] in ours)


def names(ours: Iterable[str], rules: Rules) -> set[str]:
    """What weights of ours are called in a published checkpoint: the rules read the other way."""
    return {published for name in ours for published in _published(name, rules)}


def _published(name: str, rules: Rules) -> list[str]:
    for prefixes, ours in rules:
        found = [published for prefix in prefixes if (published := _replaced(name, ours, prefix))]
        if found:
            return found
    return [name]


def differences(module: nn.Module, weights: dict[str, Tensor]) -> dict[str, list[str]]:
    """Names that the module lacks weights for (`missing`, wrong shapes too) and weights without a place (`unused`)."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{n}: {shapes[n]}, expected {expected[n]}" for n in expected.keys() & shapes.keys() if shapes[n] != expected[n]
    ]
    return {
        "missing": sorted([*(expected.keys() - shapes.keys()), *wrong]),
        "unused": sorted(shapes.keys() - expected.keys()),
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder or file of safetensors or torch's .bin; of the latter tensors only, no pickled code."""
    inside = [[path]] if path.is_file() else [sorted(path.glob(f"*{suffix}")) for suffix in SUFFIXES]
    files = next((found for found in inside if found), [])
    files = [file for file in files if file.name not in ("training_args.bin", "optimizer.bin", "scheduler.bin")]
    if not files:
        raise UserError(f"{path} has no *.safetensors and no *.bin, *.pt or *.pth")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_file(file)
    return tensors


def _tensors(loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of a state dict, also where it lies within what a training saved beside it."""
    for key in ("state_dict", "model"):
        if isinstance(loaded.get(key), Mapping):
            return _tensors(loaded[key])
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return _tensors(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds pickled code, which is not run: it must be tensors alone") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise Failure(f"{file} of {file.stat().st_size} bytes is damaged: {why[0]}; fetch it again") from error

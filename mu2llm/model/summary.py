"""What a model of given settings is and costs, without its weights: shapes, parameters, memory, FLOPs of one scan.

Everything is counted on a run of the model itself on tensors without values, not from formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedConfig

from mu2llm import weights
from mu2llm.model.building import configuration, small_configuration
from mu2llm.model.modeling import Mu2ForConditionalGeneration
from mu2llm.records import PreprocessSpec
from mu2llm.settings.model import ModelConfig

_STEPS = {
    "patches": "model.vision.tower.stem",
    "vision": "model.vision.tower",
    "pooled": "model.vision",
    "projected": "model.projector",
    "selected": "model.mu2_tokenizer.selection",
    "multi-scale": "model.mu2_tokenizer.pooling",
    "visual tokens": "model.mu2_tokenizer",
}
_PARTS = {
    "vision": "model.vision.",
    "projector": "model.projector.",
    "tokenizer": "model.mu2_tokenizer.",
    "language model": "",
}


@dataclass
class Summary:
    """`steps` are (name, shape) of one scan; FLOPs of one forward, per part; bytes for bf16 weights.

    `activation_bytes` is what one scan's forward keeps for the backward pass, without gradient checkpointing;
    `training_bytes` what full training with AdamW keeps per model: fp32 weights, gradients and two moments.
    """

    steps: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    activation_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        return 2 * sum(self.parameters.values())

    @property
    def training_bytes(self) -> int:
        return 16 * sum(self.parameters.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": {name: list(shape) for name, shape in self.steps},
            "parameters": {**self.parameters, "all": sum(self.parameters.values())},
            "flops": {**self.flops, "all": sum(self.flops.values())},
            "bytes": {
                "weights": self.weight_bytes,
                "training": self.training_bytes,
                "activations": self.activation_bytes,
            },
        }

    def __str__(self) -> str:
        lines = [f"{name:<16}{' × '.join(map(str, shape))}" for name, shape in self.steps]
        lines += [""]
        for part, count in {**self.parameters, "all": sum(self.parameters.values())}.items():
            work = self.flops.get(part, sum(self.flops.values()))
            lines += [f"{part:<16}{count / 1e6:10.2f} M parameters{work / 1e9:12.1f} GFLOP a scan"]
        lines += [""]
        for name, size in (
            ("weights (bf16)", self.weight_bytes),
            ("training (AdamW)", self.training_bytes),
            ("activations", self.activation_bytes),
        ):
            lines += [f"{name:<18}{size / 2**30:8.2f} GiB"]
        return "\n".join(lines)


def summarise(model: ModelConfig, spec: PreprocessSpec, question_tokens: int = 32, text_tokens: int = 256) -> Summary:
    """One scan, one question of `question_tokens` and a report of `text_tokens`, through the whole model."""
    config = configuration(model, spec, text_config(model))
    length = config.tokenizer.queries + question_tokens + text_tokens
    with FakeTensorMode():
        whole = Mu2ForConditionalGeneration(config).eval()
        inputs = {
            "input_ids": torch.zeros(1, length, dtype=torch.long),
            "attention_mask": torch.ones(1, length, dtype=torch.long),
            "volumes": torch.zeros(1, *spec.shape),
            "question_ids": torch.zeros(1, question_tokens, dtype=torch.long),
        }
        summary = Summary(parameters=_count(whole), steps=[("volume", tuple(inputs["volumes"].shape))])
        with _recorded(whole, summary.steps), kept_for_backward() as kept, _counter() as counter:
            logits = whole(**inputs, use_cache=False).logits
    summary.steps.append(("logits", tuple(logits.shape)))
    summary.activation_bytes = sum(kept.values())
    summary.flops = _flops(counter)
    return summary


def text_config(model: ModelConfig) -> PreTrainedConfig:
    """Of the backbone, without its weights; of `small` with its vocabulary as large as it may become."""
    if model.language_model != "small":
        return weights.language_config(model.language_model)
    return small_configuration(model, model.small.vocabulary)


def _count(whole: nn.Module) -> dict[str, int]:
    counts = dict.fromkeys(_PARTS, 0)
    for name, parameter in whole.named_parameters():  # tied weights once
        counts[next(part for part, prefix in _PARTS.items() if name.startswith(prefix))] += parameter.numel()
    return counts


def _counter() -> FlopCounterMode:
    """torch counts every attention kernel but the CPU's."""

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: attention})


def _flops(counter: FlopCounterMode) -> dict[str, float]:
    by_module = {name: float(sum(counts.values())) for name, counts in counter.get_flop_counts().items()}
    root = "Mu2ForConditionalGeneration"
    parts = {part: by_module.get(f"{root}.{prefix.rstrip('.')}", 0.0) for part, prefix in _PARTS.items() if prefix}
    return {**parts, "language model": by_module["Global"] - sum(parts.values())}


@contextmanager
def _recorded(whole: nn.Module, steps: list[tuple[str, tuple[int, ...]]]) -> Iterator[None]:
    """Notes the shape that comes out of each step."""

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            steps.append((name, tuple(first.shape)))

        return hook

    there = dict(whole.named_modules())  # not every tower has a stem, and SPECTRE's runs on whole scans
    handles = [there[path].register_forward_hook(note(name)) for name, path in _STEPS.items() if path in there]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def kept_for_backward() -> Iterator[dict[Any, int]]:
    """Bytes of each tensor that autograd keeps, parameters aside; a storage kept twice counts once."""
    sizes: dict[Any, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not (tensor.is_leaf and tensor.requires_grad):
            base = tensor._base if tensor._base is not None else tensor
            if not isinstance(base, nn.Parameter):
                alive.append(base)  # so that no other tensor gets its id
                sizes[id(base)] = base.numel() * base.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes

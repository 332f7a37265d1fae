"""What a worker of each stage keeps in memory, counted on the model itself on tensors without values (issue 17).

Weights, gradients and moments are counted on the parameters, activations on what autograd keeps of one forward pass
at the stage's own batch and precision. No formula of layers, so that what changes in the model changes here.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mu2llm import weights
from mu2llm.config import Experiment
from mu2llm.errors import UserError
from mu2llm.model.building import add_lora, configuration, contrastive_configuration, vision_configuration
from mu2llm.model.contrastive import Mu2ForContrastive
from mu2llm.model.head import MOST_LOGITS
from mu2llm.model.initialisation import rounded_modules
from mu2llm.model.modeling import Mu2ForConditionalGeneration
from mu2llm.model.summary import kept_for_backward, text_config
from mu2llm.model.vision import VisionEncoder
from mu2llm.settings.inference import Precision
from mu2llm.settings.stages import StageConfig

Stage = Literal["contrastive", "sft", "dpo"]
GIB = 2**30
GRADIENT, MOMENTS = 4, 8
"""Bytes a trained parameter: a gradient in fp32, AdamW's two moments in fp32."""
TEXTS_PER_CASE = 8
"""Sentences or findings of a report that contrast holds against the scan: about the mean of CT-RATE's."""
QUESTION_TOKENS = 32
TEXT_TOKENS = 64
"""Of the longest sentence of a batch, to which a text encoder that is trained pads the others."""


MEMORY_MENDS = (
    "set {stage}.gradient_checkpointing=true, a smaller {stage}.batch_size with {stage}.accumulation, model.lora, or "
    "{stage}.fsdp with more workers, or take a larger GPU"
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker. `logits` are what the loss over the vocabulary takes for a moment: gradients, and of a head
    that is computed in pieces the logits of one."""

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int = 0
    gradients_stay: bool = False

    @property
    def peak(self) -> int:
        """The most at one time, in bytes: gradients grow as activations go, unless they stay between two passes."""
        backward = self.activations + self.logits
        both = self.gradients + backward if self.gradients_stay else max(self.gradients, backward)
        return self.weights + self.moments + both

    def as_dict(self) -> dict[str, float]:
        """GiB by kind, and the peak."""
        names = ("weights", "gradients", "moments", "activations", "logits")
        return {**{name: round(getattr(self, name) / GIB, 3) for name in names}, "peak": round(self.peak / GIB, 3)}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in self.as_dict().items() if name != "peak" and gib)
        return f"{self.peak / GIB:.1f} GiB ({parts})"


def training_memory(experiment: Experiment, stage: Stage) -> Memory:
    """One training worker of a stage at its share of the global batch, with AdamW and fp32 master weights.

    The longest texts that the model takes are assumed. Sharding (`fsdp`) divides weights, gradients and moments.
    """
    settings: StageConfig = getattr(experiment, stage)
    workers = settings.workers if isinstance(settings.workers, int) else settings.workers[0]
    workers = max(1, workers)
    scans = max(1, settings.batch_size // workers)
    with torch.device("meta"):
        model = _contrastive(experiment) if stage == "contrastive" else _language(experiment, stage)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable()
    with FakeTensorMode(), _autocast(settings.precision):
        _without_values(model)
        trained, frozen = _parameter_bytes(model)
        with kept_for_backward() as kept:
            if stage == "contrastive":
                _contrast(model, experiment, scans, workers)
                logits = 0
            else:
                logits = _write(model, experiment, scans, sequences=2 if stage == "dpo" else 1, stage=stage)
    shards = workers if settings.fsdp else 1
    return Memory(
        weights=(4 * trained + frozen) // shards,
        gradients=GRADIENT * trained // shards,
        moments=MOMENTS * trained // shards,
        activations=sum(kept.values()),
        logits=logits,
        gradients_stay=settings.accumulation > 1 or workers > 1,  # DDP keeps its buckets
    )


def inference_memory(experiment: Experiment, scans: int, sequences: int, precision: Precision = "fp32") -> Memory:
    """One process that encodes `scans` at a time and writes `sequences` reports of them.

    `activations` is the larger of two: the most that encoding the scans holds at a time, and the language model's keys
    and values at the longest text.
    """
    exact = precision == "fp32"
    with torch.device("meta"):
        model = _language(experiment, "evaluate")
        for module in () if exact else rounded_modules(model):
            module.to(torch.bfloat16)
    with FakeTensorMode(), torch.inference_mode(), _autocast(precision), _Live() as live:
        _without_values(model)
        count = live.now
        model.encode_vision(torch.zeros(scans, *experiment.data.spec.shape, dtype=torch.uint8))
        encoding = live.most - count
    config: Any = model.config.text
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = experiment.model.max_text_tokens + experiment.model.tokenizer.visual_tokens
    cache = 2 * config.num_hidden_layers * heads * head * length * sequences * (4 if exact else 2)
    return Memory(weights=count, gradients=0, moments=0, activations=max(encoding, cache))


class _Live(TorchDispatchMode):
    """Bytes of all tensors that are alive, now and at the most, of those that are made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                size = storage.nbytes()
                self._seen[storage] = size
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, size)
        return output

    def _gone(self, size: int) -> None:
        self.now -= size


def check_memory(experiment: Experiment, stage: Stage, device_bytes: int) -> None:
    """A UserError with the numbers and the mends where a stage's worker cannot fit a device of so many bytes."""
    need = training_memory(experiment, stage)
    if need.peak > device_bytes:
        raise UserError(
            f"{stage} needs {need} a worker and the device has {device_bytes / GIB:.1f} GiB: "
            f"{MEMORY_MENDS.format(stage=stage)}"
        )


def _contrastive(experiment: Experiment) -> Mu2ForContrastive:
    spec, model = experiment.data.spec, experiment.model
    encoder = weights.text_encoder_config(model.text_encoder) if experiment.contrastive.train_text_encoder else None
    width = encoder.hidden_size if encoder else 384  # at most: other widths change a few MB
    config = contrastive_configuration(model, spec, experiment.contrastive, width, encoder)
    contrastive = Mu2ForContrastive(config).train()
    if experiment.contrastive.freeze_vision:
        contrastive.vision.freeze()
    return contrastive


def _language(experiment: Experiment, stage: str) -> Any:
    """The whole model as a stage trains it: what it freezes frozen, LoRA put on."""
    config = configuration(experiment.model, experiment.data.spec, text_config(experiment.model))
    model = Mu2ForConditionalGeneration(config).train()
    if stage == "evaluate":
        return model.eval()
    settings: StageConfig = getattr(experiment, stage)
    if settings.freeze_vision:
        model.freeze_vision()
    if getattr(settings, "freeze_language_model", False):
        model.freeze_language_model()
    return add_lora(model, experiment.model.lora).train() if experiment.model.lora else model


def _without_values(model: nn.Module) -> None:
    """Meta tensors → tensors without values on a device, for which autocast and kernels behave as on a real one."""
    new: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, VisionEncoder) and module.anatomy is not None:
            module.anatomy.eval()  # in training it looks at how often it was updated: a value
        slots: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in slots:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in new:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    trained = tensor.requires_grad
                    new[id(tensor)] = nn.Parameter(empty, trained) if isinstance(tensor, nn.Parameter) else empty
                tensors[name] = new[id(tensor)]


def _parameter_bytes(model: nn.Module) -> tuple[int, int]:
    """(number of trained parameters, bytes of the frozen ones in the precision that they are held in)"""
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    frozen = sum(each.numel() * each.element_size() for each in model.parameters() if not each.requires_grad)
    return trained, frozen


def _write(model: Any, experiment: Experiment, scans: int, sequences: int, stage: str) -> int:
    """The forward pass of SFT (one report a scan) or DPO (two); bytes of the gradients of its logits."""
    settings, spec = getattr(experiment, stage), experiment.data.spec
    rows, length = scans * sequences, experiment.model.max_text_tokens + experiment.model.tokenizer.visual_tokens
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    batch["question_ids"] = torch.zeros(scans, QUESTION_TOKENS, dtype=torch.long)
    if settings.freeze_vision and getattr(settings, "cached", True):
        batch["vision_features"] = _features(experiment, scans)
    else:
        batch["volumes"] = torch.zeros(scans, *spec.shape, dtype=getattr(torch, spec.dtype))
    model(**batch, tile_scans=sequences > 1, use_cache=False)
    vocabulary, exact = model.get_output_embeddings().weight.shape[0], settings.precision == "fp32"
    count = rows * (length - 1) * vocabulary
    if count <= MOST_LOGITS:
        return int(count * (4 if exact else 6))
    return 16 * MOST_LOGITS  # of a piece: the logits, computed again, and what their gradients are made of


def _features(experiment: Experiment, scans: int) -> Tensor:
    """As the cache of frozen vision gives them."""
    spec = experiment.data.spec
    vision = vision_configuration(experiment.model, spec)
    return torch.zeros(scans, vision.chunks, vision.tokens, vision.hidden_size, dtype=torch.float16)


def _contrast(model: Mu2ForContrastive, experiment: Experiment, scans: int, workers: int) -> None:
    """The forward pass: this worker's scans through vision and, with all workers' texts, through the head."""
    spec = experiment.data.spec
    mask = torch.ones(scans, spec.shape[0], dtype=torch.bool)
    if experiment.contrastive.freeze_vision:
        features = _features(experiment, scans).float()
    else:
        features = model.vision(torch.zeros(scans, *spec.shape, dtype=getattr(torch, spec.dtype)))
    texts = _texts(model, scans * TEXTS_PER_CASE).repeat(workers, 1)
    model.head(texts, model.head.scan(features), mask.repeat_interleave(features.shape[2], dim=1))


def _texts(model: Mu2ForContrastive, count: int) -> Tensor:
    """This worker's texts as the head reads them: embeddings, or what an encoder makes of them that is trained."""
    if model.text_encoder is None:
        return torch.zeros(count, model.config.text_width)
    ids = torch.zeros(count, TEXT_TOKENS, dtype=torch.long)
    return model.embed_texts(text_ids=ids, text_mask=torch.ones_like(ids))


def _autocast(precision: str) -> torch.autocast:
    kinds = {"bf16": torch.bfloat16, "fp16": torch.bfloat16}  # the CPU's autocast has no fp16; the sizes are the same
    return torch.autocast("cpu", dtype=kinds.get(precision, torch.bfloat16), enabled=precision in kinds)

"""The one place that decides on which device and in which precision a model runs that does not train.

In bf16 (and fp16) the weights of linear and convolution layers are held in that precision and all runs under autocast,
which casts exactly these in training too: the same numbers as a training step's forward, at half the memory. What is
normalised, embedded or kept as a running statistic stays in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from mu2llm import model as models
from mu2llm import storage
from mu2llm.artefacts import open_checkpoint
from mu2llm.errors import UserError
from mu2llm.model import Mu2ForConditionalGeneration, Mu2ForContrastive, Mu2Processor
from mu2llm.model.initialisation import rounded_modules
from mu2llm.settings.inference import Device, Precision

Encoder = Mu2ForConditionalGeneration | Mu2ForContrastive
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M = TypeVar("M", bound=nn.Module)


def load(
    uri: str, precision: Precision = "fp32", device: Device = "cpu"
) -> tuple[Mu2ForConditionalGeneration, Mu2Processor]:
    """A checkpoint's model, to write with, and its processor. Raises UserError where it has no language model."""
    model, processor = models.load(uri, torch.float32)
    return place(model, precision, device), processor


def load_encoder(uri: str, precision: Precision = "fp32", device: Device = "cpu") -> Encoder:
    """The model of a checkpoint of any stage, for its `encode_vision`."""
    if open_checkpoint(uri).lineage.stage != "contrastive":
        return load(uri, precision, device)[0]
    with storage.local_copy(uri) as folder:
        return place(Mu2ForContrastive.from_pretrained(folder, dtype=torch.float32), precision, device)


def place(model: M, precision: Precision, device: Device) -> M:
    """The same model, in evaluation mode and without gradients, where and as it is to run.

    Raises UserError where there is no such device.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "a model is to run on a GPU, and this process sees none: set the section's device to cpu, such as "
                "evaluation.device=cpu, or gpus_per_actor to 0"
            )
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked for
    model.requires_grad_(False).eval()
    if precision != "fp32":
        for module in rounded_modules(model):
            module.to(DTYPES[precision])
    return model.to(device)


def rounded(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast of a precision, as in training."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


@contextlib.contextmanager
def numerics(device: torch.device, precision: Precision) -> Iterator[None]:
    """In it a model on `device` runs without gradients, in `precision`."""
    with torch.inference_mode(), rounded(device, precision):
        yield

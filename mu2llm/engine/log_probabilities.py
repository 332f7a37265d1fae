"""How probable texts are to a model, and how far two models are from each other over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mu2llm.engine.loading import numerics
from mu2llm.model import Mu2ForConditionalGeneration
from mu2llm.settings.inference import Precision


def sequence_logps(
    model: Mu2ForConditionalGeneration,
    batch: dict[str, Any],
    ld_alpha: float | None = None,
    precision: Precision = "fp32",
) -> Tensor:
    """trl's batch of B pairs, all chosen before all rejected → (2B,) log-probability of each completion in nats.

    Tokens beyond the pair's shorter completion weigh `ld_alpha` (LD-DPO, arXiv 2409.06411).
    """
    inputs = dict(batch)
    mask = inputs.pop("completion_mask")[:, 1:]
    with numerics(model.device, precision):
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        tokens = inputs["input_ids"][:, 1:, None]
        logps = logits.gather(-1, tokens).squeeze(-1) - logits.logsumexp(-1)
        weight = mask.to(logps.dtype)
        if ld_alpha is not None:
            shared = mask.sum(1).view(2, -1).amin(0).repeat(2)[:, None]
            weight = weight * torch.where(mask.cumsum(1) <= shared, 1.0, ld_alpha)
        return (logps * weight).sum(1)


def divergences(
    model: Any, reference: Any, inputs: dict[str, Tensor], precision: Precision = "fp32"
) -> tuple[float, int]:
    """Sum over the answers' tokens of KL(policy ‖ reference) of the next-token distributions, in nats; the tokens.

    `inputs` are the models' own, with `labels` (B, L) that are −100 where there is no answer.
    """
    labels = inputs["labels"][:, 1:]
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    with numerics(labels.device, precision):
        ours, theirs = (
            each(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1) for each in (model, reference)
        )
        each = (ours.exp() * (ours - theirs)).sum(-1)
        answers = labels != -100
        return float(each[answers].sum()), int(answers.sum())

"""How probable texts are to a model, and how far two models are from each other over them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from mu2llm.engine.loading import numerics
from mu2llm.model import Mu2ForConditionalGeneration
from mu2llm.model.head import IGNORED, divergence, next_token_logps
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
    completion = inputs.pop("completion_mask")
    labels, mask = inputs["input_ids"].masked_fill(completion == 0, IGNORED), completion[:, 1:]
    with numerics(model.device, precision):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        logps = next_token_logps(hidden, labels, model.lm_head)
        weight = mask.to(logps.dtype)
        if ld_alpha is not None:
            shared = mask.sum(1).view(2, -1).amin(0).repeat(2)[:, None]
            weight = weight * torch.where(mask.cumsum(1) <= shared, 1.0, ld_alpha)
        return (logps * weight).sum(1)


@torch.no_grad()
def answer_logps(
    model: Mu2ForConditionalGeneration,
    inputs: dict[str, Tensor],
    labels: Tensor,
    features: Tensor,
    chunk_mask: Tensor,
    precision: Precision = "fp32",
) -> Tensor:
    """Texts and labels (R, L), scans' features (R, T, n, E) → (R, L − 1) log-probability of each next token in nats, on
    the CPU; 0 where there is no answer."""
    moved = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with numerics(model.device, precision):
        hidden = model.model(**moved, vision_features=features, chunk_mask=chunk_mask, use_cache=False)
        return next_token_logps(hidden.last_hidden_state, labels.to(model.device), model.lm_head).float().cpu()


def divergences(
    model: Any, reference: Any, inputs: dict[str, Tensor], precision: Precision = "fp32"
) -> tuple[float, int]:
    """Sum over the answers' tokens of KL(policy ‖ reference) of the next-token distributions, in nats; the tokens.

    `inputs` are the models' own, with `labels` (B, L) that are −100 where there is no answer.
    """
    labels = inputs["labels"]
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    whole: list[Any] = [each.get_base_model() if isinstance(each, PeftModel) else each for each in (model, reference)]
    with numerics(labels.device, precision):
        ours, theirs = (each.model(**inputs, use_cache=False).last_hidden_state for each in whole)
        total = divergence(ours, theirs, labels, whole[0].lm_head, whole[1].lm_head)
    return float(total), int((labels[:, 1:] != IGNORED).sum())

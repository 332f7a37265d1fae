"""Where in the scan each sentence comes from: how much it hangs on each visual token, spread over what that selected.

For a sentence with log-probability ℓ, visual token v weighs ‖∂ℓ/∂v‖·‖v‖, and its weights over the patches
(`return_selection`) carry that to places. (Gradient × input says nothing here: the language model's RMS norm makes ℓ
all but blind to a token's length, so their product vanishes.) It shows what the sentence depended on, not that it is
right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from mu2llm.engine.loading import rounded
from mu2llm.green import sentences
from mu2llm.model import Mu2ForConditionalGeneration, Mu2Processor
from mu2llm.settings.inference import Precision


@dataclass(frozen=True)
class Span:
    """A sentence: characters `start` to `end` of the report."""

    text: str
    start: int
    end: int


def spans(report: str) -> list[Span]:
    """The sentences of a report where they stand in it; headings are in none."""
    found, place = [], 0
    for sentence in sentences(report):
        words = r"\s+".join(re.escape(word) for word in sentence.split())
        match = re.compile(words).search(report, place)
        if match:
            found.append(Span(match[0], match.start(), match.end()))
            place = match.end()
    return found


def sentence_maps(
    model: Mu2ForConditionalGeneration,
    processor: Mu2Processor,
    vision_features: Tensor,
    chunk_mask: Tensor,
    question: str,
    report: str,
    precision: Precision = "fp32",
) -> list[tuple[Span, np.ndarray]]:
    """vision_features (1, T, n, E), chunk_mask (1, T) → each sentence's weights (T, z, y, x) over the patches."""
    inputs = {name: tensor.to(model.device) for name, tensor in processor.encode([question]).items()}
    asked = {name: inputs[name] for name in ("question_ids", "question_mask")}
    with torch.no_grad(), rounded(model.device, precision):
        visual = model.encode_volumes(
            vision_features=vision_features, chunk_mask=chunk_mask, return_selection=True, **asked
        )
    assert visual.tokens is not None and visual.selection is not None
    tokens = visual.tokens.detach().clone().requires_grad_(True)
    ids, places = _answer(processor, report, model.device)
    parts = [(span, _tokens_of(span, places)) for span in spans(report)]
    parts = [(span, part) for span, part in parts if part]
    if not parts:
        return []
    with torch.enable_grad(), rounded(model.device, precision):
        full = torch.cat([inputs["input_ids"], ids[None]], dim=1)
        logits = model(input_ids=full, visual_tokens=tokens, logits_to_keep=len(ids) + 1).logits[0, :-1]
        each = logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        grads = [torch.autograd.grad(each[part].sum(), tokens, retain_graph=True)[0] for _, part in parts]
    shares = torch.stack([(grad.norm(dim=-1) * tokens.norm(dim=-1))[0] for grad in grads]).detach()
    maps = torch.einsum("sq,qtzyx->stzyx", shares, visual.selection[0].to(shares))
    return [(span, weights) for (span, _), weights in zip(parts, maps.float().cpu().numpy(), strict=True)]


def _answer(processor: Mu2Processor, report: str, device: torch.device) -> tuple[Tensor, list[tuple[int, int]]]:
    """The report's token ids, and the characters that each stands for."""
    told = processor.tokenizer(report, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    return torch.tensor(told.input_ids, device=device), [(int(a), int(b)) for a, b in told.offset_mapping]


def _tokens_of(span: Span, places: list[tuple[int, int]]) -> list[int]:
    return [i for i, (start, end) in enumerate(places) if start < span.end and end > span.start]


def overlay(weights: np.ndarray, affine: np.ndarray, patch_size: tuple[int, ...]) -> bytes:
    """Weights (T, z, y, x) over the patches → an uncompressed NIfTI-1 in the scan's world, uint8, 255 the highest.

    `affine` is the ModelInput's: the grid's (column, row, slice) to mm in RAS+.
    """
    volume = weights.reshape(-1, *weights.shape[2:]).transpose(2, 1, 0)
    highest = float(volume.max())
    scaled = np.rint(255 * volume / highest if highest > 0 else volume).astype(np.uint8)
    image = nib.Nifti1Image(scaled, affine @ patch_to_grid(patch_size))
    image.header.set_xyzt_units("mm")
    return bytes(image.to_bytes())


def patch_to_grid(patch_size: tuple[int, ...]) -> np.ndarray:
    """A patch's index (x, y, z) → where its centre lies in the grid (column, row, slice); sizes are (z, y, x)."""
    size = np.array(patch_size[::-1], dtype=np.float64)
    there = np.diag([*size, 1.0])
    there[:3, 3] = (size - 1) / 2
    return there

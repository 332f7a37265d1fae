"""Scans and questions → texts: greedy, or sampled so that a case's n-th sample is the same in any batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mu2llm.model import Mu2ForConditionalGeneration, Mu2Processor


@dataclass(frozen=True)
class Decoding:
    """How reports are drawn: greedy at temperature 0 (and one sample then), else nucleus sampling."""

    max_new_tokens: int = 256
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"{self.samples} greedy samples would all be the same; give a temperature above 0")


@dataclass(frozen=True)
class Text:
    """What a model wrote: its length in tokens, and whether it came to an end by itself."""

    text: str
    tokens: int
    finished: bool


@torch.inference_mode()
def write(
    model: Mu2ForConditionalGeneration,
    processor: Mu2Processor,
    vision_features: Tensor,
    chunk_mask: Tensor,
    questions: Sequence[str],
    keys: Sequence[str],
    decoding: Decoding,
) -> list[list[Text]]:
    """vision_features (R, T, n, E) and chunk_mask (R, T) with a question each → `decoding.samples` texts each.

    `keys` (R,), such as the cases' ids, decide with seed and number what is drawn.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in processor.encode(questions).items()}
    asked = {name: inputs[name] for name in ("question_ids", "question_mask")}
    tokens = model.encode_volumes(vision_features=vision_features, chunk_mask=chunk_mask, **asked).tokens
    assert tokens is not None
    ids, mask, visual_tokens = (
        each.repeat_interleave(decoding.samples, dim=0)
        for each in (inputs["input_ids"], inputs["attention_mask"], tokens)
    )
    processors = LogitsProcessorList()
    if decoding.temperature:
        uniform = torch.tensor(np.concatenate([draws(key, decoding) for key in keys])).to(model.device)
        processors.append(_Sampling(uniform, ids.shape[1], decoding))
    tokenizer = processor.tokenizer
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        visual_tokens=visual_tokens,
        logits_processor=processors,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # whatever the checkpoint's own generation settings are: the draw is made above
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    texts = [read_text(row.tolist(), processor) for row in written[:, ids.shape[1] :].cpu()]
    return [texts[start : start + decoding.samples] for start in range(0, len(texts), decoding.samples)]


def read_text(ids: list[int], processor: Mu2Processor) -> Text:
    """The ids that a model wrote → their text, up to its end."""
    end = processor.tokenizer.eos_token_id
    finished = end in ids
    ids = ids[: ids.index(end)] if finished else ids
    return Text(processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids), finished)


def draws(key: str, decoding: Decoding) -> np.ndarray:
    """(samples, max_new_tokens) uniform numbers that depend on nothing but seed, key and sample."""
    seeds = ([decoding.seed, zlib.crc32(key.encode()), sample] for sample in range(decoding.samples))
    return np.stack([np.random.default_rng(seed).random(decoding.max_new_tokens) for seed in seeds])


def nucleus(scores: Tensor, uniform: Tensor, decoding: Decoding) -> Tensor:
    """Scores (R, vocabulary) and uniform numbers (R, 1) → ids (R, 1), drawn from the fewest tokens that hold top_p."""
    probability, order = (scores.double() / decoding.temperature).softmax(-1).sort(dim=-1, descending=True)
    below = probability.cumsum(-1) - probability
    size = (below < decoding.top_p).sum(-1, keepdim=True)
    mass = (below + probability).gather(-1, size - 1)
    place = ((below <= uniform * mass).sum(-1, keepdim=True) - 1).clamp(min=0)
    return order.gather(-1, torch.minimum(place, size - 1))


class _Sampling(LogitsProcessor):
    """Leaves the one token that is drawn by given uniform numbers (rows, steps)."""

    def __init__(self, uniform: Tensor, prompt_length: int, decoding: Decoding) -> None:
        self.uniform, self.prompt_length, self.decoding = uniform, prompt_length, decoding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        uniform = self.uniform[:, input_ids.shape[1] - self.prompt_length, None]
        drawn = nucleus(scores, uniform, self.decoding)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)

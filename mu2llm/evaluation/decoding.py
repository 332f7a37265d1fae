"""Scans and questions → texts: greedy, or sampled so that a case's n-th sample is the same in any batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

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


class Watch(Protocol):
    """Follows a batch while it is written, from the thread that writes it."""

    def step(self, tokens: list[int]) -> None:
        """The next token of each row; padding where a row has come to its end."""
        ...

    def stopped(self) -> list[bool]:
        """For each row, whether no more of it is wanted."""
        ...


@torch.inference_mode()
def write(
    model: Mu2ForConditionalGeneration,
    processor: Mu2Processor,
    vision_features: Tensor,
    chunk_mask: Tensor,
    questions: Sequence[str],
    keys: Sequence[str],
    decoding: Decoding,
    watch: Watch | None = None,
) -> list[list[Text]]:
    """vision_features (R, T, n, E) and chunk_mask (R, T) with a question each → `decoding.samples` texts each.

    `keys` (R,), such as the cases' ids, decide with seed and number what is drawn. `watch` sees each step.
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
        uniform = torch.tensor(np.concatenate([_draws(key, decoding) for key in keys])).to(model.device)
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
        **_watched(watch),
    )
    texts = [read_text(row.tolist(), processor) for row in written[:, ids.shape[1] :].cpu()]
    return [texts[start : start + decoding.samples] for start in range(0, len(texts), decoding.samples)]


def _watched(watch: Watch | None) -> dict[str, Any]:
    if watch is None:
        return {}
    return {"streamer": _Steps(watch), "stopping_criteria": StoppingCriteriaList([_Stopping(watch)])}


class _Steps(BaseStreamer):
    """Tells a watch of each step; what transformers puts first is the prompt."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.begun = watch, False

    def put(self, value: Tensor) -> None:
        if self.begun:
            self.watch.step(value.flatten().tolist())
        self.begun = True

    def end(self) -> None:
        pass


class _Stopping(StoppingCriteria):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(self.watch.stopped(), device=input_ids.device)


def read_text(ids: list[int], processor: Mu2Processor) -> Text:
    """The ids that a model wrote → their text, up to its end."""
    end = processor.tokenizer.eos_token_id
    finished = end in ids
    ids = ids[: ids.index(end)] if finished else ids
    return Text(processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids), finished)


def _draws(key: str, decoding: Decoding) -> np.ndarray:
    """(samples, max_new_tokens) uniform numbers that depend on nothing but seed, key and sample."""
    seeds = ([decoding.seed, zlib.crc32(key.encode()), sample] for sample in range(decoding.samples))
    return np.stack([np.random.default_rng(seed).random(decoding.max_new_tokens) for seed in seeds])


class _Sampling(LogitsProcessor):
    """Nucleus sampling by given uniform numbers (rows, steps): leaves one token to choose from."""

    def __init__(self, uniform: Tensor, prompt_length: int, decoding: Decoding) -> None:
        self.uniform, self.prompt_length, self.decoding = uniform, prompt_length, decoding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        probability, order = (scores.double() / self.decoding.temperature).softmax(-1).sort(dim=-1, descending=True)
        below = probability.cumsum(-1) - probability
        nucleus = (below < self.decoding.top_p).sum(-1, keepdim=True)  # the fewest tokens that hold top_p
        mass = (below + probability).gather(-1, nucleus - 1)
        draw = self.uniform[:, input_ids.shape[1] - self.prompt_length, None] * mass
        place = ((below <= draw).sum(-1, keepdim=True) - 1).clamp(min=0)
        place = torch.minimum(place, nucleus - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, order.gather(-1, place), 0.0)

"""Reports written together token by token, which others join and any leaves between two tokens.

transformers' own continuous batching takes token ids alone; ours puts a scan's visual tokens into the prompt. The rows
lie right-aligned in one cache of keys and values, padded on the left, so that those who come and go only change what
is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mu2llm.engine.sampling import Decoding, draws, nucleus
from mu2llm.model import Mu2ForConditionalGeneration, Mu2Processor
from mu2llm.model.mu2_tokenizer import VisualTokens


@dataclass(eq=False)
class Line:
    """What is written of one row; `key` decides with the decoding's seed what is drawn."""

    question: str
    key: str
    decoding: Decoding

    def __post_init__(self) -> None:
        self.ids: list[int] = []
        self.uniform = draws(self.key, self.decoding)[0] if self.decoding.temperature else None

    def draw(self, scores: Tensor) -> int:
        """The next token of scores (vocabulary,), where it is drawn."""
        assert self.uniform is not None
        uniform = torch.tensor([[self.uniform[len(self.ids)]]], device=scores.device)
        return int(nucleus(scores[None], uniform, self.decoding))


class Writing:
    """The lines that a model writes now. Each `join` and `step` adds one token to each line that it is about."""

    def __init__(self, model: Mu2ForConditionalGeneration, processor: Mu2Processor) -> None:
        self.model, self.processor = model, processor
        self.lines: list[Line] = []
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)

    @property
    def open(self) -> bool:
        """Whether a line can join: to those that are there only where the whole past of each is kept as it was."""
        return self._cache is None or all(type(layer) is DynamicLayer for layer in self._cache.layers)

    @torch.inference_mode()
    def join(self, vision_features: Tensor, chunk_mask: Tensor, lines: Sequence[Line]) -> None:
        """vision_features (R, T, n, E) and chunk_mask (R, T) with a line each, whose first token is written."""
        inputs = self.processor.encode([line.question for line in lines])
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        asked = {name: inputs[name] for name in ("question_ids", "question_mask")}
        visual = self.model.encode_volumes(vision_features=vision_features, chunk_mask=chunk_mask, **asked)
        cache, mask = DynamicCache(config=self.model.config.text), inputs["attention_mask"]
        self._write(lines, inputs["input_ids"], mask, cache, visual_tokens=visual)
        self.lines += lines
        longest = max(self._mask.shape[1], mask.shape[1])
        self._mask = torch.cat([_padded(each, longest, 1) for each in (self._mask, mask)])
        self._cache = cache if self._cache is None else _joined(self._cache, cache, longest)

    @torch.inference_mode()
    def step(self) -> None:
        """The next token of every line."""
        assert self._cache is not None
        last = torch.tensor([[line.ids[-1]] for line in self.lines], device=self.model.device)
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        self._write(self.lines, last, self._mask, self._cache)

    def leave(self, gone: set[Line]) -> None:
        """Lets go of lines, whether they are at their end or not."""
        kept = [index for index, line in enumerate(self.lines) if line not in gone]
        if len(kept) == len(self.lines):
            return
        self.lines = [self.lines[index] for index in kept]
        if not kept or self._cache is None:
            self._cache, self._mask = None, self._mask[:0, :0]
            return
        rows = torch.tensor(kept, device=self._mask.device)
        self._mask = self._mask[rows]
        self._cache.batch_select_indices(rows)
        if self.open:
            longest = int(self._mask.sum(1).max())
            self._mask = self._mask[:, -longest:]
            for layer in _layers(self._cache):
                layer.keys, layer.values = layer.keys[:, :, -longest:], layer.values[:, :, -longest:]

    def _write(
        self,
        lines: Sequence[Line],
        ids: Tensor,
        mask: Tensor,
        cache: DynamicCache,
        visual_tokens: VisualTokens | None = None,
    ) -> None:
        """Each line's next token, from the ids (R, L) that are new to the cache and the mask of all that is in it."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        scores = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            visual_tokens=visual_tokens,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].float()  # fmt: skip
        best = scores.argmax(-1).tolist()  # one transfer for all rows
        for line, row, token in zip(lines, scores, best, strict=True):
            line.ids.append(token if line.uniform is None else line.draw(row))


def _layers(cache: DynamicCache) -> list[Any]:
    """The layers of an open cache: each holds keys and values (rows, heads, length, width)."""
    return list(cache.layers)


def _joined(first: DynamicCache, second: DynamicCache, longest: int) -> DynamicCache:
    """The rows of both, padded on the left; it is the first that is changed."""
    for ours, theirs in zip(_layers(first), _layers(second), strict=True):
        ours.keys, ours.values = (
            torch.cat([_padded(getattr(layer, name), longest, 2) for layer in (ours, theirs)])
            for name in ("keys", "values")
        )
    return first


def _padded(x: Tensor, length: int, dim: int) -> Tensor:
    """Zeros before what is there, up to a length along a dimension."""
    return functional.pad(x, (*(0, 0) * (x.dim() - 1 - dim), length - x.shape[dim], 0))

"""The decoder: texts written together token by token; others join and any leaves between two tokens.

transformers' own continuous batching takes token ids alone; ours puts a scan's visual tokens into the prompt. The
sequences lie right-aligned in one cache of keys and values, padded on the left, so that those who come and go only
change what is padded. The samples of a prompt share its scan and its prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mu2llm.engine.loading import numerics
from mu2llm.engine.sampling import Decoding, draws, nucleus
from mu2llm.errors import Failure
from mu2llm.model import Mu2ForConditionalGeneration, Mu2Processor
from mu2llm.settings.inference import Precision


@dataclass(frozen=True)
class Prompt:
    """A question about a scan, answered `decoding.samples` times; `key`, such as the case's id, decides with the
    decoding's seed what is drawn."""

    question: str
    key: str
    decoding: Decoding


@dataclass(frozen=True)
class Text:
    """What a model wrote: its length in tokens, and whether it came to an end by itself."""

    text: str
    tokens: int
    finished: bool


@dataclass(eq=False)
class TokenSequence:
    """One sample of a prompt while it is written: its `ids` so far; `over` when there will be no more, where it failed
    (which leaves the others be) with its `fault`."""

    decoding: Decoding
    uniform: np.ndarray | None
    ids: list[int] = field(default_factory=list)
    over: bool = False
    fault: Failure | None = None

    @classmethod
    def of(cls, prompt: Prompt) -> list[TokenSequence]:
        """The samples of a prompt."""
        decoding = prompt.decoding
        uniform = draws(prompt.key, decoding) if decoding.temperature else [None]
        return [cls(decoding, each) for each in uniform]


class ContinuousDecoder:
    """The sequences that a model writes now. Each `join` and `step` adds one token to each that it is about."""

    def __init__(
        self, model: Mu2ForConditionalGeneration, processor: Mu2Processor, precision: Precision = "fp32"
    ) -> None:
        self.model, self.processor, self.precision = model, processor, precision
        self.end: int = processor.tokenizer.eos_token_id
        self.sequences: list[TokenSequence] = []
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)

    @property
    def open(self) -> bool:
        """Whether others can join: to those that are there only where the whole past of each is kept as it was."""
        return self._cache is None or all(type(layer) is DynamicLayer for layer in self._cache.layers)

    def join(self, vision_features: Tensor, chunk_mask: Tensor, prompts: Sequence[Prompt]) -> list[TokenSequence]:
        """vision_features (R, T, n, E) and chunk_mask (R, T) with a prompt each → their samples, the first token
        written, those of a prompt together. Raises UserError where a prompt is too long."""
        sequences = [TokenSequence.of(prompt) for prompt in prompts]
        inputs = self.processor.encode([prompt.question for prompt in prompts])
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        asked = {name: inputs[name] for name in ("question_ids", "question_mask")}
        cache, mask = DynamicCache(config=self.model.config.text), inputs["attention_mask"]
        with numerics(self.model.device, self.precision):
            visual = self.model.encode_volumes(vision_features=vision_features, chunk_mask=chunk_mask, **asked)
            scores = self._scores(inputs["input_ids"], mask, cache, visual_tokens=visual)
            samples = torch.tensor([len(each) for each in sequences], device=mask.device)
            rows = torch.arange(len(prompts), device=mask.device).repeat_interleave(samples)
            if len(rows) > len(prompts):
                mask, scores = mask[rows], scores[rows]
                cache.reorder_cache(rows)  # type: ignore[arg-type]
            new = [sequence for each in sequences for sequence in each]
            self._append(new, scores)
            self.sequences = self.sequences + new
            longest = max(self._mask.shape[1], mask.shape[1])
            self._mask = torch.cat([_padded(each, longest, 1) for each in (self._mask, mask)])
            self._cache = cache if self._cache is None else _joined(self._cache, cache, longest)
        return new

    def step(self) -> None:
        """The next token of every sequence."""
        assert self._cache is not None
        with numerics(self.model.device, self.precision):
            last = torch.tensor([[sequence.ids[-1]] for sequence in self.sequences], device=self.model.device)
            self._mask = functional.pad(self._mask, (0, 1), value=1)
            self._append(self.sequences, self._scores(last, self._mask, self._cache))

    def leave(self, gone: set[TokenSequence]) -> None:
        """Lets go of sequences, whether they are over or not."""
        kept = [index for index, sequence in enumerate(self.sequences) if sequence not in gone]
        if len(kept) == len(self.sequences):
            return
        self.sequences = [self.sequences[index] for index in kept]
        if not kept or self._cache is None:
            self._cache, self._mask = None, self._mask[:0, :0]
            return
        with numerics(self.model.device, self.precision):
            rows = torch.tensor(kept, device=self._mask.device)
            self._mask = self._mask[rows]
            self._cache.reorder_cache(rows)  # type: ignore[arg-type]
            if self.open:
                longest = int(self._mask.sum(1).max())
                self._mask = self._mask[:, -longest:]
                for layer in _layers(self._cache):
                    layer.keys, layer.values = layer.keys[:, :, -longest:], layer.values[:, :, -longest:]

    def text(self, sequence: TokenSequence) -> Text:
        """What a sequence says so far, without the special tokens."""
        ids = [token for token in sequence.ids if token != self.end]  # it is the last where it is there
        words = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Text(words, len(ids), len(ids) < len(sequence.ids))

    def _scores(self, ids: Tensor, mask: Tensor, cache: DynamicCache, **scan: Any) -> Tensor:
        """(R, vocabulary) of each row's next token, from the ids (R, L) that are new to the cache and the mask (R, all)
        of what is in it then."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        outputs = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **scan,
        )
        return outputs.logits[:, -1].float()

    def _append(self, sequences: Sequence[TokenSequence], scores: Tensor) -> None:
        """Each sequence's next token of its scores (R, vocabulary)."""
        chosen = scores.argmax(-1)
        drawn = [row for row, sequence in enumerate(sequences) if sequence.uniform is not None]
        if drawn:
            by = torch.tensor([_draw(sequences[row]) for row in drawn], dtype=torch.float64).to(scores.device)
            rows = torch.tensor(drawn, device=scores.device)
            chosen[rows] = nucleus(scores[rows], *by.split(1, dim=1))[:, 0]
        for sequence, token in zip(sequences, chosen.tolist(), strict=True):  # one transfer for all
            sequence.ids.append(token)
            sequence.over = token == self.end or len(sequence.ids) == sequence.decoding.max_new_tokens


def write(
    decoder: ContinuousDecoder,
    vision_features: Tensor,
    chunk_mask: Tensor,
    prompts: Sequence[Prompt],
    max_sequences: int | None = None,
) -> list[list[Text]]:
    """vision_features (R, T, n, E) and chunk_mask (R, T) with a prompt each → the texts of each prompt's samples.

    With `max_sequences` no more are written at once than that (or one prompt's samples): further prompts join as
    others end. The texts are the same in any case. Raises UserError where a prompt is too long.
    """
    texts: list[list[TokenSequence]] = []
    try:
        while len(texts) < len(prompts) or decoder.sequences:
            first, end = len(texts), len(texts) + _room(decoder, prompts[len(texts) :], max_sequences)
            if end > first:
                some = prompts[first:end]
                joined = iter(decoder.join(vision_features[first:end], chunk_mask[first:end], some))
                texts += [[next(joined) for _ in range(prompt.decoding.samples)] for prompt in some]
            else:
                decoder.step()
            decoder.leave({sequence for sequence in decoder.sequences if sequence.over})
    finally:
        decoder.leave(set(decoder.sequences))  # where one failed, the next texts are written without it
    return [[decoder.text(sequence) for sequence in samples] for samples in texts]


def _room(decoder: ContinuousDecoder, waiting: Sequence[Prompt], max_sequences: int | None) -> int:
    """How many of the prompts that wait can join now."""
    if decoder.sequences and not decoder.open:
        return 0
    if max_sequences is None:
        return len(waiting)
    after = len(decoder.sequences) + np.cumsum([prompt.decoding.samples for prompt in waiting])
    return max(int((after <= max_sequences).sum()), int(not decoder.sequences and bool(waiting)))


def _draw(sequence: TokenSequence) -> tuple[float, float, float]:
    """Uniform number, temperature and top_p of a sequence's next token."""
    assert sequence.uniform is not None
    return sequence.uniform[len(sequence.ids)], sequence.decoding.temperature, sequence.decoding.top_p


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

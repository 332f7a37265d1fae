"""Tokens a second, each scan encoded once; and what it adds that others join as some end."""

from __future__ import annotations

import time
from collections.abc import Iterator

import parity
import torch
import training
from machine import Machine
from rows import Row, at_least, told

from mu2llm.engine.decoder import ContinuousDecoder, Prompt, write
from mu2llm.engine.loading import place
from mu2llm.engine.sampling import Decoding
from mu2llm.model import VOLUME_TOKEN
from mu2llm.model.building import processor_for
from mu2llm.weights import train_tokenizer

BATCHES = (1, 8, 32)
SLOTS = 8


def check(machine: Machine) -> Iterator[Row]:
    experiment = training.of(machine, "full")
    machine.free()
    model = training.language_model(machine, experiment)
    words = train_tokenizer(parity.REPORTS, 300, [VOLUME_TOKEN, "<user>", "<assistant>", "<system>"])
    model.config.volume_token_id = int(words.convert_tokens_to_ids(VOLUME_TOKEN))
    placed = place(model, "bf16", "cuda" if machine.cuda else "cpu")
    decoder = ContinuousDecoder(placed, processor_for(model.config, experiment.data.spec, words), "bf16")
    decoder.end = -1  # no text ends before its length: a model of random weights says nothing
    batches, length = ((1, 4), 6) if machine.small else (BATCHES, 128)
    rate = 0.0
    for batch in batches:
        decoded, seconds = _write(machine, decoder, [length] * batch, None)
        rate = decoded / seconds
        yield told("writing", f"{batch} at a time, {length} tokens each: tokens/s", f"{rate:.1f}", rate)
    shorts = (2, 8) if machine.small else (32, 256)
    slots = 2 if machine.small else SLOTS
    mixed = [shorts[i % 4 == 0] for i in range(4 * slots)]
    decoded, joined = _write(machine, decoder, mixed, slots)
    waited = sum(_write(machine, decoder, mixed[i : i + slots], None)[1] for i in range(0, len(mixed), slots))
    what = f"others join as some end, {slots} at a time: times the speed of batch after batch"
    gain = waited / joined
    yield told("writing", what, f"{gain:.2f}×", gain) if machine.small else at_least("writing", what, gain, 1.2)


def _write(machine: Machine, decoder: ContinuousDecoder, lengths: list[int], slots: int | None) -> tuple[int, float]:
    """Texts of these lengths from one scan each, whose features are there: tokens and seconds."""
    vision, device = decoder.model.config.vision, decoder.model.device
    tokens = vision.pooled_grid[0] * vision.pooled_grid[1] * vision.pooled_grid[2]
    features = torch.randn(len(lengths), vision.chunks, tokens, vision.hidden_size, device=device)
    mask = torch.ones(features.shape[:2], dtype=torch.bool, device=device)
    prompts = [Prompt(parity.QUESTION, str(i), Decoding(length)) for i, length in enumerate(lengths)]
    machine.wait()
    started = time.perf_counter()
    texts = write(decoder, features, mask, prompts, slots)
    machine.wait()
    return sum(text.tokens for (text,) in texts), time.perf_counter() - started

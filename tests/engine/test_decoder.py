"""Sequences that join and leave say what each says alone, and what transformers generates."""

import numpy as np
import pytest
import torch
from small_runs import least
from transformers.cache_utils import DynamicSlidingWindowLayer

from mu2llm.engine.decoder import ContinuousDecoder, Prompt, Text, write
from mu2llm.engine.sampling import Decoding, draws, nucleus
from mu2llm.errors import UserError
from mu2llm.model import build

QUESTIONS = ["Write.", "Is there a nodule in the left lung?", "x", "What about the liver and the heart?", "Write.", "y"]
DECODINGS = [
    *(Decoding(12), Decoding(9, 2, temperature=1.0, top_p=0.9, seed=3), Decoding(3)),
    *(Decoding(15, 3, temperature=0.7, seed=1), Decoding(20), Decoding(1)),
]
PROMPTS = [Prompt(*each) for each in zip(QUESTIONS, map(str, range(6)), DECODINGS, strict=True)]
WORDS = ["There is a large left pleural effusion.", "The liver is normal. No lung nodule."] * 2


@pytest.fixture(scope="module")
def scans():
    """An untrained model, whose texts differ by scan and question, with the features of six scans."""
    torch.manual_seed(0)
    settings = least()
    model, processor = build(settings.model, settings.data.spec, WORDS, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far apart, so that rounding decides nothing
    voxels = torch.randint(0, 256, (6, *settings.data.spec.shape), dtype=torch.uint8)
    mask = torch.tensor([[True, n % 2 == 0] for n in range(6)])
    with torch.inference_mode():
        return model.eval(), processor, model.eval().encode_vision(voxels, mask), mask


def generated(scans, row):
    """What transformers' own `generate` writes of a prompt: a row at a time, the draws put into its logits."""
    model, processor, features, mask = scans
    prompt = PROMPTS[row]
    texts = []
    for sample in range(prompt.decoding.samples):
        inputs = processor.encode([prompt.question])
        length = inputs["input_ids"].shape[1]
        uniform = draws(prompt.key, prompt.decoding)[sample]

        def sampled(ids, scores, length=length, uniform=uniform, decoding=prompt.decoding):
            at = torch.tensor([[uniform[ids.shape[1] - length]]])
            drawn = nucleus(scores, at, decoding.temperature, decoding.top_p)
            return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)

        written = model.generate(
            vision_features=features[[row]],
            chunk_mask=mask[[row]],
            do_sample=False,
            max_new_tokens=prompt.decoding.max_new_tokens,
            logits_processor=[sampled] if prompt.decoding.temperature else [],
            **inputs,
        )[0, length:].tolist()
        end = processor.tokenizer.eos_token_id
        ids = written[: written.index(end)] if end in written else written
        words = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        texts.append(Text(words, len(ids), end in written))
    return texts


def test_texts_are_those_that_transformers_generates(scans):
    """Greedy and sampled, written together or a few at a time."""
    model, processor, features, mask = scans
    expected = [generated(scans, row) for row in range(6)]
    assert len({text.text for texts in expected for text in texts}) > 4
    for most in (None, 4, 1):
        decoder = ContinuousDecoder(model, processor)
        assert write(decoder, features, mask, PROMPTS, most) == expected
        assert not decoder.sequences


def test_no_more_sequences_than_may_are_written_at_once_but_one_prompts_samples(scans, monkeypatch):
    model, processor, features, mask = scans
    seen = []
    step = ContinuousDecoder.step
    monkeypatch.setattr(ContinuousDecoder, "step", lambda self: (seen.append(len(self.sequences)), step(self)))
    write(ContinuousDecoder(model, processor), features, mask, PROMPTS, 4)
    assert max(seen) == 4
    seen.clear()
    write(ContinuousDecoder(model, processor), features, mask, PROMPTS, 1)
    assert max(seen) == 3  # three samples of one prompt


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_joining_gives_the_same_texts(scans, seed):
    model, processor, features, mask = scans
    rng = np.random.default_rng(seed)
    decoder, coming, written = ContinuousDecoder(model, processor), list(rng.permutation(6)), {}
    while coming or decoder.sequences:
        new, coming = coming[: (n := int(rng.integers(0, 3)))], coming[n:]
        if new:
            sequences = iter(decoder.join(features[new], mask[new], [PROMPTS[row] for row in new]))
            written |= {row: [next(sequences) for _ in range(DECODINGS[row].samples)] for row in new}
        decoder.leave({sequence for sequence in decoder.sequences if sequence.over})
        if decoder.sequences:
            decoder.step()
        decoder.leave({sequence for sequence in decoder.sequences if sequence.over})
    for row in range(6):
        (alone,) = write(ContinuousDecoder(model, processor), features[[row]], mask[[row]], [PROMPTS[row]])
        assert [decoder.text(sequence) for sequence in written[row]] == alone


def test_the_cache_is_as_long_as_the_longest_sequence(scans):
    """However long others that have left were, or how long there has been anyone."""
    model, processor, features, mask = scans
    decoder, longest = ContinuousDecoder(model, processor), 0
    for row in range(6):
        decoder.join(features[[row]], mask[[row]], [Prompt("x", str(row), Decoding(8))])
        for _ in range(4):
            decoder.step()
        decoder.leave(set(decoder.sequences[:-1]))
        longest = max(longest, decoder._mask.shape[1])
    assert longest == decoder._mask.shape[1] == decoder._cache.layers[0].keys.shape[2]
    decoder.leave(set(decoder.sequences))
    assert not decoder.sequences and decoder.open


def test_a_cache_that_forgets_is_closed_to_others(scans):
    """They wait until it is empty: the texts are the same."""
    model, processor, features, mask = scans
    decoder = ContinuousDecoder(model, processor)
    decoder.join(features[:1], mask[:1], PROMPTS[:1])
    assert decoder.open
    decoder._cache.layers[0] = DynamicSlidingWindowLayer(sliding_window=8)
    assert not decoder.open


def test_a_prompt_that_is_too_long_is_a_users_mistake(scans):
    model, processor, features, mask = scans
    decoder = ContinuousDecoder(model, processor)
    with pytest.raises(UserError, match="tokens; the model takes 128"):
        write(decoder, features[:2], mask[:2], [PROMPTS[0], Prompt("word " * 200, "a", Decoding(4))], 1)
    assert write(decoder, features[:1], mask[:1], PROMPTS[:1]) == [generated(scans, 0)]


def test_sampling_follows_the_nucleus():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    uniform = torch.linspace(0, 0.9999, 2000, dtype=torch.float64)[:, None]
    chosen = nucleus(scores.expand(2000, -1), uniform, 1.0, 0.9)[:, 0]
    shares = torch.bincount(chosen, minlength=4) / 2000
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    assert torch.allclose(shares, expected, atol=2e-3)
    assert (nucleus(scores.expand(2000, -1), uniform, 0.01, 1.0) == 0).all()


def test_rows_are_drawn_by_their_own_temperature_and_top_p():
    scores = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]).expand(3, -1))
    uniform = torch.full((3, 1), 0.9, dtype=torch.float64)
    temperature, top_p = torch.tensor([[0.01], [1.0], [1.0]]), torch.tensor([[1.0], [0.6], [1.0]])
    assert nucleus(scores, uniform, temperature, top_p)[:, 0].tolist() == [0, 1, 2]


def test_greedy_samples_are_refused():
    with pytest.raises(ValueError, match="temperature"):
        Decoding(samples=4)

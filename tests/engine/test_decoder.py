"""Lines that join and leave write what each writes alone."""

import numpy as np
import pytest
import torch
from small_writer import FIRST, experiment
from transformers.cache_utils import DynamicSlidingWindowLayer

from mu2llm.engine.decoder import Line, Writing
from mu2llm.engine.sampling import Decoding, write
from mu2llm.model import build

QUESTIONS = ["Write.", "Is there a nodule in the left lung?", "x", "What about the liver and the heart?", "Write.", "y"]
DECODINGS = [
    *(Decoding(12), Decoding(9, temperature=1.0, top_p=0.9, seed=3), Decoding(3)),
    *(Decoding(15, temperature=0.7, seed=1), Decoding(20), Decoding(1)),
]


@pytest.fixture(scope="module")
def writer():
    """An untrained model, whose texts differ by scan and question, with the features of six scans."""
    settings = experiment()
    model, processor = build(settings.model, settings.data.spec, [FIRST] * 4, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far apart, so that rounding decides nothing
    voxels = torch.randint(0, 256, (6, *settings.data.spec.shape), dtype=torch.uint8)
    mask = torch.tensor([[True, n % 2 == 0] for n in range(6)])
    with torch.inference_mode():
        return model.eval(), processor, model.eval().encode_vision(voxels, mask), mask


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_joining_gives_the_same_texts(writer, seed):
    model, processor, features, mask = writer
    rng = np.random.default_rng(seed)
    lines = [Line(*each) for each in zip(QUESTIONS, map(str, range(6)), DECODINGS, strict=True)]
    writing, to_come = Writing(model, processor), list(rng.permutation(6))
    while to_come or writing.lines:
        new, to_come = to_come[: (n := int(rng.integers(0, 3)))], to_come[n:]
        if new:
            writing.join(features[new], mask[new], [lines[index] for index in new])
        writing.leave({line for line in writing.lines if over(line, processor)})
        if writing.lines:
            writing.step()
        writing.leave({line for line in writing.lines if over(line, processor)})
    for index, line in enumerate(lines):
        one = slice(index, index + 1)
        ((alone,),) = write(model, processor, features[one], mask[one], [line.question], [line.key], DECODINGS[index])
        assert (processor.tokenizer.decode(line.ids, skip_special_tokens=True).strip(), len(line.ids)) == (
            alone.text,
            alone.tokens + alone.finished,
        )


def over(line, processor):
    return len(line.ids) == line.decoding.max_new_tokens or line.ids[-1] == processor.tokenizer.eos_token_id


def test_the_cache_is_as_long_as_the_longest_line(writer):
    """However long others that have left were, or how long there has been anyone."""
    model, processor, features, mask = writer
    writing, longest = Writing(model, processor), 0
    for index in range(6):
        line = Line(QUESTIONS[2], str(index), Decoding(8))
        writing.join(features[[index]], mask[[index]], [line])
        for _ in range(4):
            writing.step()
        writing.leave(set(writing.lines[:-1]))
        longest = max(longest, writing._mask.shape[1])
    assert longest == writing._mask.shape[1] == writing._cache.layers[0].keys.shape[2]
    writing.leave(set(writing.lines))
    assert not writing.lines and writing.open


def test_a_cache_that_forgets_is_closed_to_others(writer):
    model, processor, features, mask = writer
    writing = Writing(model, processor)
    writing.join(features[:1], mask[:1], [Line("Write.", "a", Decoding(4))])
    assert writing.open
    writing._cache.layers[0] = DynamicSlidingWindowLayer(sliding_window=8)
    assert not writing.open

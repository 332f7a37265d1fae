"""A decoder whose tokens another server writes: they are our own decoder's, and what goes wrong there is said."""

import queue
import socket
from dataclasses import replace

import pytest
import torch
from fake_vllm import FakeVllm, serving
from test_decoder import PROMPTS, scans  # noqa: F401

from mu2llm.engine.decoder import ContinuousDecoder, write
from mu2llm.engine.remote import Endpoint, EndpointFault, RemoteDecoder
from mu2llm.engine.sampling import Decoding
from mu2llm.model.causal import causal

GREEDY = [replace(each, decoding=Decoding(12 + number)) for number, each in enumerate(PROMPTS)]
NAME = "mu2llm-sft-0123456789ab"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served(scans, tmp_path_factory):  # noqa: F811
    """The server of the model's language model, as `export lm` writes it, and where it is."""
    model, processor, *_ = scans
    folder = tmp_path_factory.mktemp("lm")
    causal(model, processor).save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    fake = FakeVllm(folder, NAME, key="secret")
    with serving(fake, free_port()) as url:
        yield fake, url


@pytest.fixture
def fake(served):
    fake, _ = served
    fake.asked, fake.shapes, fake.mode, fake.left = [], [], None, 0
    return fake


@pytest.fixture
def endpoint(served, fake):
    return Endpoint(served[1], NAME, "secret", silent_s=30)


@pytest.fixture
def decoder(scans, endpoint):  # noqa: F811
    model, processor, *_ = scans
    return RemoteDecoder(model, processor, "fp32", endpoint)


def written(decoder, features, mask):
    """The sequences of all prompts, when they are over."""
    sequences = decoder.join(features, mask, GREEDY)
    while decoder.sequences:
        decoder.leave({each for each in sequences if each.over})
        if decoder.sequences:
            decoder.step()
    return sequences


def test_greedy_tokens_are_our_own_decoders(scans, decoder, fake):  # noqa: F811
    model, processor, features, mask = scans
    theirs, own = written(decoder, features, mask), written(ContinuousDecoder(model, processor), features, mask)
    expected = [each.ids for each in own]
    assert [each.ids for each in theirs] == expected
    assert len({tuple(ids) for ids in expected}) > 3  # they differ by scan and question
    lengths = [len(processor.token_ids(each.question)[0]) for each in GREEDY]
    hidden = model.config.text.hidden_size
    assert sorted(fake.shapes) == sorted(((length, hidden), torch.float32) for length in lengths)
    assert sorted(each["max_tokens"] for each in fake.asked) == [each.decoding.max_new_tokens for each in GREEDY]


def test_texts_written_a_few_at_a_time_are_the_same(scans, decoder):  # noqa: F811
    model, processor, features, mask = scans
    expected = write(ContinuousDecoder(model, processor), features, mask, GREEDY)
    assert write(decoder, features, mask, GREEDY, max_sequences=2) == expected


def test_what_decides_the_text_is_said_whatever_the_servers_defaults_are(scans, decoder, fake):  # noqa: F811
    _, processor, features, mask = scans
    drawn = [replace(PROMPTS[0], decoding=Decoding(3, temperature=0.7, top_p=0.9, seed=seed)) for seed in (1, 1, 2)]
    for each in (*drawn, GREEDY[0]):
        write(decoder, features[:1], mask[:1], [each])
    *sampled, greedy = fake.asked
    assert [(each["temperature"], each["top_p"]) for each in fake.asked] == [(0.7, 0.9)] * 3 + [(0.0, 1.0)]
    assert sampled[0]["seed"] == sampled[1]["seed"] != sampled[2]["seed"] and "seed" not in greedy
    for each in fake.asked:
        assert (each["top_k"], each["min_p"], each["repetition_penalty"]) == (0, 0.0, 1.0)
        assert each["stop_token_ids"] == [processor.tokenizer.eos_token_id]


def test_weights_in_bf16_send_half_the_bytes(scans, endpoint, fake):  # noqa: F811
    model, processor, features, mask = scans
    write(RemoteDecoder(model, processor, "bf16", endpoint), features[:1], mask[:1], GREEDY[:1])
    assert fake.shapes[0][1] == torch.bfloat16


@pytest.mark.parametrize(
    ("mode", "why", "passing"),
    [
        *((500, "answered 500", True), (503, "answered 503", True), (429, "answered 429", True)),
        *((400, "answered 400", False), (404, "answered 404", False)),
        *(("early", "ended early", True), ("error", "failed while it wrote", True)),
    ],
)
def test_a_sequence_that_fails_says_why_and_leaves_the_others_be(scans, decoder, fake, mode, why, passing):  # noqa: F811
    _, _, features, mask = scans
    fake.mode = mode
    (failing,) = decoder.join(features[:1], mask[:1], GREEDY[:1])
    while not failing.over:
        decoder.step()
    assert why in failing.fault.why and failing.fault.passing is passing
    with pytest.raises(EndpointFault, match=why):
        decoder.text(failing)
    fake.mode = None
    (fine,) = decoder.join(features[:1], mask[:1], GREEDY[:1])
    while not fine.over:
        decoder.step()
    assert fine.fault is None and decoder.text(fine).tokens


def test_a_server_that_is_silent_or_not_there(scans, served, fake):  # noqa: F811
    model, processor, features, mask = scans
    fake.mode = "silent"
    for url, why in ((served[1], "ReadTimeout"), (f"http://127.0.0.1:{free_port()}/v1", "ConnectError")):
        decoder = RemoteDecoder(model, processor, "fp32", Endpoint(url, NAME, "secret", silent_s=0.5))
        with pytest.raises(EndpointFault, match=why) as told:
            write(decoder, features[:1], mask[:1], GREEDY[:1])
        assert told.value.passing


def test_what_nobody_waits_for_is_written_no_further(scans, decoder, fake):  # noqa: F811
    _, _, features, mask = scans
    fake.mode = "silent"
    (gone,) = decoder.join(features[:1], mask[:1], GREEDY[:1])
    while not fake.asked:
        decoder.step()
    decoder.leave({gone})
    assert not decoder.sequences
    waited = queue.SimpleQueue()
    for _ in range(600):
        if fake.left:
            break
        with pytest.raises(queue.Empty):
            waited.get(timeout=0.1)
    assert fake.left == 1


def test_a_server_of_another_model_or_with_another_key(served, endpoint, fake):
    endpoint.check()
    with pytest.raises(EndpointFault, match=rf"serves '{NAME}', not 'other': .*--served-model-name other"):
        Endpoint(served[1], "other", "secret").check()
    with pytest.raises(EndpointFault, match="answered 401"):
        Endpoint(served[1], NAME).check()

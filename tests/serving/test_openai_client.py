"""Chat as OpenAI's own client asks for it: what is supported works, what is not is a 400 that says so."""

import base64

import pytest
from small_service import GUARD_S
from small_writer import FIRST, QUESTION, experiment

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed: pip install 'mu2llm[dev]'")
pytestmark = pytest.mark.slow


@pytest.fixture
def completions(service):
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{service}/v1", api_key="none", max_retries=0, timeout=GUARD_S) as made:
        yield made.chat.completions


@pytest.fixture
def asked(phantom):
    """A question about a scan, as that client sends it."""
    url = "data:application/octet-stream;base64," + base64.b64encode(phantom).decode()
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "any", "messages": [{"role": "user", "content": parts}]}


def test_clients_of_openai(client, completions, asked):
    answer = completions.create(**asked, temperature=0)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", FIRST, "stop")
    assert answer.usage.completion_tokens > 10
    queries = experiment().model.tokenizer.queries
    assert queries < answer.usage.prompt_tokens < queries + 192  # which max_text_tokens is
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert client.get("/v1/models").json()["data"][0]["id"] == answer.model
    cut = completions.create(**asked, max_completion_tokens=5)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 5)


def test_openais_stream_is_put_together(completions, asked):
    """The role came with every piece: "assistantassistant…"."""
    with completions.stream(**asked) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        whole = stream.get_final_completion()
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", FIRST, "stop")
    assert "".join(pieces) == FIRST and whole.usage is None


def test_openais_usage_comes_last_where_it_is_asked_for(completions, asked):
    chunks = list(completions.create(**asked, stream=True, max_tokens=6, stream_options={"include_usage": True}))
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and usage.completion_tokens == 6
    assert usage == completions.create(**asked, max_tokens=6).usage and usage.prompt_tokens > 0
    plain = list(completions.create(**asked, stream=True, max_tokens=6))
    assert plain[-1].choices and not any("usage" in chunk.model_fields_set for chunk in plain)


@pytest.mark.parametrize("streamed", [False, True])
def test_openais_stop_ends_the_answer(completions, asked, streamed):
    """It was dropped without a word."""
    answer = completions.create(**asked, stop=[" The liver", "no such words"], stream=streamed)
    if streamed:
        choices = [chunk.choices[0] for chunk in answer]
        assert "".join(choice.delta.content or "" for choice in choices) == FIRST[: FIRST.index(" The liver")]
        assert choices[-1].finish_reason == "stop"
    else:
        assert answer.choices[0].message.content == FIRST[: FIRST.index(" The liver")]
        assert answer.choices[0].finish_reason == "stop"


def test_null_is_as_absent_to_openais_clients(completions, asked):
    names = ("n", "stream", "temperature", "top_p", "seed", "max_tokens", "max_completion_tokens", "stop")
    answer = completions.create(**asked, extra_body=dict.fromkeys((*names, "stream_options", "tools")))
    assert answer.choices[0].message.content == FIRST


@pytest.mark.parametrize(
    ("given", "named"),
    [
        *(({"n": 2}, "n is not supported"), ({"logprobs": True}, "logprobs"), ({"logit_bias": {"5": 1}}, "logit_bias")),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        *(({"presence_penalty": 0.5}, "presence_penalty"), ({"reasoning_effort": "low"}, "reasoning_effort")),
        ({"stream_options": {"include_usage": True}}, "stream=true alone"),
        ({"extra_body": {"guided_regex": ".*"}}, "a field is not known here"),
    ],
)
def test_what_is_not_supported_is_a_400_that_says_so(completions, asked, given, named):
    """It was ignored, and the answer was another than was asked for."""
    with pytest.raises(openai.BadRequestError, match=named) as told:
        completions.create(**asked, **given)
    assert told.value.code == "unsupported"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
        {"role": "tool", "content": "42", "tool_call_id": "x"},
    ],
)
def test_messages_that_are_not_supported(completions, asked, message):
    with pytest.raises(openai.BadRequestError, match="messages"):
        completions.create(model="any", messages=[*asked["messages"], message])


def test_what_changes_nothing_is_taken(completions, asked):
    neutral = {
        "n": 1,
        "tools": [],
        "tool_choice": "none",
        "logprobs": False,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }
    ignored = {"user": "anna", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    answer = completions.create(**asked, **neutral, **ignored, response_format={"type": "text"}, max_tokens=100_000)
    assert answer.choices[0].message.content == FIRST


def test_a_seed_draws_the_same_again(completions, asked):
    drawn = [completions.create(**asked, temperature=3, seed=seed, max_tokens=8) for seed in (-1, -1, 2)]
    first, again, other = (each.choices[0].message.content for each in drawn)
    assert first == again != other


def test_values_that_cannot_be(completions, asked):
    for wrong in ({"stop": list("abcde")}, {"temperature": 9}, {"max_tokens": 0}):
        with pytest.raises(openai.UnprocessableEntityError, match=next(iter(wrong))):
            completions.create(**asked, **wrong)


def test_a_text_with_its_scan_named_by_id(client, completions, phantom):
    """So that a further question does not send it again."""
    kept = client.post("/v1/scans", files={"scan": ("a.nii.gz", phantom)}).json()["id"]
    parts = [{"type": "image_url", "image_url": {"url": f"scan:{kept}"}}, {"type": "text", "text": QUESTION}]
    answer = completions.create(model="any", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == FIRST


def test_a_chat_without_a_scan(client):
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello"}]})
    assert (answer.status_code, answer.json()["code"]) == (422, "no_scan")
    assert answer.json()["error"]["message"]

"""The OpenAI-compatible face: a scan as a data or storage URL in a message, the report as the answer."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mu2llm.serving.decoder import Scan
from mu2llm.serving.problems import Problem
from mu2llm.serving.schemas import Report, ReportOptions, StopSequence, StopSequences
from mu2llm.serving.service import Made, Upload
from mu2llm.serving.uris import data_url, decoded

Reason = Literal["stop", "length"]
LONG = 2**16  # bytes of a data URL above which it is no JSON parser's work
MOST = 10_000  # data URLs that are looked at
MAX_TOKENS = 4096  # of an answer; who asks for more gets no more
PARTS = ("text", "image_url", "file")
_FIELD = re.compile(rb'"(?:url|file_data)"\s*:\s*$')


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "top_logprobs"), (0,)),
    "logprobs": (False,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ()),
}
"""What would change an answer and is not supported → its values that change nothing."""
IGNORED = {
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention"),
}
"""What changes no answer."""


def unsupported(what: str) -> Problem:
    return Problem(400, "unsupported", f"{what}; see /docs")


class Loose(BaseModel):
    """Null is as absent; what we don't know is ignored, as far as no field says otherwise."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class Url(Loose):
    """A data URL, an allowed URI, or `scan:` and the id of a scan that was sent before."""

    url: str


class File(Loose):
    file_data: str


class Part(Loose):
    """Text, or the scan: `image_url` with its URL, or `file` with a data URL in `file_data`."""

    type: Literal["text", "image_url", "file"]
    text: str | None = None
    image_url: Url | None = None
    file: File | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text_or_a_scan(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("type"), str) and values["type"] not in PARTS:
            raise unsupported("messages.content: its parts are of type text, image_url or file")
        return values

    @property
    def scan(self) -> str | None:
        if self.type == "text":
            return None
        return self.image_url.url if self.image_url else self.file.file_data if self.file else None


class Message(Loose):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] = ""

    @model_validator(mode="before")
    @classmethod
    def _is_of_a_talk(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("role") in ("tool", "function"):
            raise unsupported("messages.role: there are no tools that could answer")
        return values

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return " ".join(part.text for part in self.content if part.type == "text" and part.text)

    @property
    def scans(self) -> list[str]:
        return [] if isinstance(self.content, str) else [part.scan for part in self.content if part.scan]


class StreamOptions(Loose):
    include_usage: bool = False


class ChatRequest(Loose):
    """The last user message is the question; the last scan in the messages is what it is about. What would change the
    answer and is not supported is a 400."""

    model: str = ""
    messages: Annotated[list[Message], Field(min_length=1, max_length=100)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: StopSequence | StopSequences = ()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=5, description="0 where nothing is said")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: Literal[1] = 1

    @model_validator(mode="before")
    @classmethod
    def _asks_for_what_there_is(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name for name, value in values.items() if value is not None}
        for name in NEUTRAL:
            if name in given and values[name] not in NEUTRAL[name]:
                raise unsupported(f"{name} is not supported, or this value of it")
        if given - {*cls.model_fields, *NEUTRAL, *IGNORED}:  # its name is the client's
            raise unsupported("a field is not known here")
        if "stream_options" in given and not values.get("stream"):
            raise unsupported("stream_options go with stream=true alone")
        return values

    def options(self) -> ReportOptions:
        users = [message.text.strip() for message in self.messages if message.role == "user"]
        question = users[-1] if users else ""
        if len(question) > 4000:
            raise Problem(422, "too_long", "the question has more than 4000 characters")
        most = self.max_completion_tokens or self.max_tokens
        return ReportOptions(
            question=question or None,
            max_new_tokens=most and min(most, MAX_TOKENS),
            temperature=self.temperature or 0,
            top_p=self.top_p or 1,
            seed=(self.seed or 0) % 2**63,
            stop=(self.stop,) if isinstance(self.stop, str) else self.stop,
        )

    def scan(self) -> str:
        """Its URL; a 422 where the messages have none."""
        scans = [scan for message in self.messages for scan in message.scans]
        if not scans:
            raise Problem(422, "no_scan", "no message has a scan: send it as image_url, a data or an s3 URL")
        return scans[-1]


def parse(body: bytearray) -> tuple[ChatRequest, Upload]:
    """The request and its scan.

    Long data URLs are cut out first and decoded piece by piece: a parser of JSON would hold the interpreter, and with
    it every other request, for seconds.
    """
    rest, cut = _cut(body)
    request = ChatRequest.model_validate_json(rest)
    url = request.scan()
    if url in cut:
        return request, Upload(files=(decoded(cut[url]),))
    data = data_url(url)
    return request, Upload(uri=url) if data is None else Upload(files=(data,))


def _cut(body: bytearray) -> tuple[bytes, dict[str, memoryview]]:
    """The JSON with names in place of its long data URLs, and what they are the names of (JSON's escapes and all)."""
    view = memoryview(body)
    cut: dict[str, memoryview] = {}
    kept: list[bytes | memoryview] = []
    begin = at = 0
    for _ in range(MOST):
        quote = body.find(b'"data:', at)
        if quote < 0:
            break
        at = max(quote + 1, body.find(b'"', quote + 1))
        if at - quote > LONG and _FIELD.search(body[max(0, quote - 64) : quote]):
            name = f"cut:{len(cut)}"
            cut[name] = view[quote + 1 : at]
            kept += [view[begin : quote + 1], name.encode()]
            begin = at
    return b"".join([*kept, view[begin:]]), cut


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int = 0
    message: ChatMessage
    finish_reason: Reason


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(BaseModel):
    """`mu2llm` holds what OpenAI's schema has no place for: the report's id, for corrections, and the scan."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    mu2llm: dict[str, Any]


def answer(report: Report) -> ChatAnswer:
    return ChatAnswer(
        id=f"chatcmpl-{report.id}",
        created=int(time.time()),
        model=report.model.id,
        choices=[Choice(message=ChatMessage(content=report.report), finish_reason=_reason(report))],
        usage=_usage(report),
        mu2llm=_besides(report),
    )


async def chunks(
    request: ChatRequest, identity: str, model: str, parts: AsyncIterator[Scan | str | Made]
) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed answer: the role, pieces of the text, the end, and the usage where it is asked for."""
    counted = request.stream_options.include_usage
    head = {
        "id": f"chatcmpl-{identity}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
        **({"usage": None} if counted else {}),
    }

    def chunk(delta: dict[str, str], reason: Reason | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    yield chunk({"role": "assistant", "content": ""})
    async for part in parts:
        if isinstance(part, str):
            yield chunk({"content": part})
        elif isinstance(part, Made):
            yield {**chunk({}, _reason(part.report)), "mu2llm": _besides(part.report)}
            if counted:
                yield {**head, "choices": [], "usage": _usage(part.report).model_dump()}


def _usage(report: Report) -> Usage:
    """The prompt's tokens are those of the text and one for each visual token."""
    total = report.prompt_tokens + report.tokens
    return Usage(prompt_tokens=report.prompt_tokens, completion_tokens=report.tokens, total_tokens=total)


def _reason(report: Report) -> Reason:
    return "stop" if report.finished else "length"


def _besides(report: Report) -> dict[str, Any]:
    return {"report_id": report.id, "scan": report.scan.model_dump(mode="json"), "disclaimer": report.disclaimer}

"""A decoder whose tokens vLLM writes: it serves what `mu2llm export lm` wrote, this process reads the scan.

The whole prompt goes there as embeddings with the visual tokens in their places, by vLLM's completions API:
`prompt_embeds` is base64 of what `torch.save` makes of a tensor (L, hidden). As a part of a chat message it would get
the server's chat template around it once more. (vllm-project/vllm, docs/features/prompt_embeds.md and
entrypoints/openai/completion/protocol.py.)
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import queue
import threading
import weakref
import zlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any

import httpx
import torch
from torch import Tensor

from mu2llm.engine.decoder import ContinuousDecoder, Prompt, Text, TokenSequence
from mu2llm.engine.loading import DTYPES, numerics
from mu2llm.engine.sampling import Decoding
from mu2llm.errors import Failure
from mu2llm.model import Mu2ForConditionalGeneration, Mu2Processor
from mu2llm.settings.inference import Precision

CONNECT_S = 10.0
WAIT_S = 0.05  # for the next token of any sequence, before others may join
BUSY = (408, 425, 429, 500, 502, 503, 504)
_NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class EndpointFault(Failure):
    """The endpoint wrote no text; `passing`: it may another time. The message has nothing of what was sent."""

    def __init__(self, why: str, passing: bool = True) -> None:
        super().__init__(f"the endpoint of the language model: {why}")
        self.why, self.passing = why, passing


class Endpoint:
    """A model behind `url`/completions of vLLM's API. `silent_s` without a byte are too long.

    Its requests run in a thread of their own, so that one is broken off at once, which ends the work there too.
    """

    def __init__(self, url: str, model: str, key: str = "", silent_s: float = 60.0) -> None:
        self.url, self.model = url.rstrip("/"), model
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(silent_s, connect=CONNECT_S, pool=None)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None))
        self._loop = loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="endpoint", daemon=True).start()
        weakref.finalize(self, loop.call_soon_threadsafe, loop.stop)

    def start(self, request: dict[str, Any], news: queue.SimpleQueue[Any], about: Any) -> Future[None]:
        """Puts (about, new ids, at the end its reason or an EndpointFault) into `news` as they come, till cancelled."""
        return asyncio.run_coroutine_threadsafe(self._follow(request, news, about), self._loop)

    def check(self) -> None:
        """Raises EndpointFault where it does not answer, or serves no model of this name."""
        names = asyncio.run_coroutine_threadsafe(self._models(), self._loop).result()
        if self.model not in names:
            raise EndpointFault(
                f"it serves {', '.join(map(repr, names)) or 'nothing'}, not {self.model!r}: start it with "
                f"--served-model-name {self.model}, or name the one that is there by serving.vllm.model",
                passing=False,
            )

    async def _models(self) -> list[str]:
        try:
            response = await self._client.get(f"{self.url}/models")
            _check_status(response)
            return [str(each["id"]) for each in response.json()["data"]]
        except httpx.HTTPError as error:
            raise EndpointFault(type(error).__name__) from None
        except (ValueError, LookupError, TypeError):
            raise EndpointFault("its list of models is no such list", passing=False) from None

    async def _follow(self, request: dict[str, Any], news: queue.SimpleQueue[Any], about: Any) -> None:
        try:
            async for ids, reason in self._tokens(request):
                news.put((about, ids, reason))
        except EndpointFault as fault:
            news.put((about, [], fault))
        except httpx.HTTPError as error:  # unreachable, silent, broken off
            news.put((about, [], EndpointFault(type(error).__name__)))
        except (ValueError, LookupError, TypeError) as error:
            news.put((about, [], EndpointFault(f"it sent no completion ({type(error).__name__})", passing=False)))

    async def _tokens(self, request: dict[str, Any]) -> AsyncIterator[tuple[list[int], str | None]]:
        """New ids and, with the last ones, why there are no more."""
        request = {"model": self.model, "stream": True, "return_token_ids": True, **request}
        async with self._client.stream("POST", f"{self.url}/completions", json=request) as response:
            _check_status(response)
            async for line in response.aiter_lines():
                name, _, data = line.partition(":")
                if name != "data" or data.strip() == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise EndpointFault("it failed while it wrote")
                for choice in event["choices"]:
                    reason = choice.get("finish_reason")
                    if reason not in (None, "stop", "length"):
                        raise EndpointFault(f"it ended by {reason!r:.20}")
                    yield [int(token) for token in choice["token_ids"] or []], reason
                    if reason:
                        return
        raise EndpointFault("its text ended early")


def _check_status(response: httpx.Response) -> None:
    code = response.status_code
    if code != 200:
        raise EndpointFault(f"it answered {code}", passing=code in BUSY)


class RemoteDecoder(ContinuousDecoder):
    """The same, but that tokens come when they come: `join` writes none yet, and `step` waits a moment for some.

    Greedy texts are those of the same language model here; what is sampled can be drawn again, but is not what is drawn
    here by the same seed. A sequence over which the endpoint failed is over, with its `fault`.
    """

    def __init__(
        self,
        model: Mu2ForConditionalGeneration,
        processor: Mu2Processor,
        precision: Precision,
        endpoint: Endpoint,
    ) -> None:
        super().__init__(model, processor, precision)
        self.endpoint = endpoint
        self._news: queue.SimpleQueue[tuple[TokenSequence, list[int], Any]] = queue.SimpleQueue()
        self._running: dict[TokenSequence, Future[None]] = {}

    def join(self, vision_features: Tensor, chunk_mask: Tensor, prompts: Sequence[Prompt]) -> list[TokenSequence]:
        """As in `ContinuousDecoder`, but that nothing is written yet."""
        new: list[TokenSequence] = []
        for prompt, row in zip(prompts, self._embeddings(vision_features, chunk_mask, prompts), strict=True):
            payload = {"prompt_embeds": packed(row)}
            for number, sequence in enumerate(TokenSequence.of(prompt)):
                request = {**payload, **self._asked(prompt.decoding, prompt.key, number)}
                self._running[sequence] = self.endpoint.start(request, self._news, sequence)
                new.append(sequence)
        self.sequences = self.sequences + new
        return new

    def step(self) -> None:
        """What has come of any sequence; waits a moment where nothing has."""
        try:
            news = [self._news.get(timeout=WAIT_S)]
        except queue.Empty:
            return
        while not self._news.empty():
            news.append(self._news.get())
        for sequence, ids, end in news:
            if sequence in self._running:
                self._append_ids(sequence, ids, end)

    def leave(self, gone: set[TokenSequence]) -> None:
        """Lets go of sequences; those that are not over are written no further there either."""
        for sequence in gone:
            if (running := self._running.pop(sequence, None)) is not None:
                running.cancel()
        super().leave(gone)

    def text(self, sequence: TokenSequence) -> Text:
        """As in `ContinuousDecoder`; raises EndpointFault where the endpoint failed over it."""
        if sequence.fault is not None:
            raise sequence.fault
        return super().text(sequence)

    def _embeddings(self, vision_features: Tensor, chunk_mask: Tensor, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Each prompt as the language model takes it (L, hidden)."""
        inputs = self.processor.encode([prompt.question for prompt in prompts])
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        asked = {name: inputs[name] for name in ("question_ids", "question_mask")}
        with numerics(self.model.device, self.precision):
            visual = self.model.encode_volumes(vision_features=vision_features, chunk_mask=chunk_mask, **asked)
            rows = self.model.model.embed_prompt(inputs["input_ids"], visual.tokens)
        masks = inputs["attention_mask"].bool()
        return [row[mask].to(DTYPES[self.precision]) for row, mask in zip(rows, masks, strict=True)]

    def _asked(self, decoding: Decoding, key: str, sample: int) -> dict[str, Any]:
        """How it is to be written, whatever the server's own defaults are."""
        drawn = {"temperature": decoding.temperature, "top_p": decoding.top_p}
        if decoding.temperature:
            drawn["seed"] = zlib.crc32(f"{decoding.seed} {key} {sample}".encode())
        return {**_NEUTRAL, **drawn, "max_tokens": decoding.max_new_tokens, "stop_token_ids": [self.end]}

    def _append_ids(self, sequence: TokenSequence, ids: list[int], end: str | EndpointFault | None) -> None:
        sequence.ids += ids
        if isinstance(end, EndpointFault):
            sequence.fault = end
        elif end == "stop" and sequence.ids[-1:] != [self.end]:  # whether or not the server tells the last one
            sequence.ids.append(self.end)
        sequence.over = end is not None


def packed(embeddings: Tensor) -> str:
    """(L, hidden) as `prompt_embeds` takes it. vLLM reads it by `torch.load(weights_only=True)`; nothing here does."""
    stream = io.BytesIO()
    torch.save(embeddings.cpu().contiguous(), stream)
    return base64.b64encode(stream.getvalue()).decode()

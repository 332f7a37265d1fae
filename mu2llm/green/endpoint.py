"""Answers of any OpenAI-compatible endpoint: vLLM, ray.serve.llm, or a provider. Concurrent, retried, rate-limited."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx

from mu2llm.errors import Failure, UserError
from mu2llm.green.prompted import Unanswered

API_KEY = "OPENAI_API_KEY"
_ATTEMPTS = 6
_TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}
_USERS_MISTAKE = {
    401: f"the key in {API_KEY} is not accepted",
    403: f"the key in {API_KEY} has no right to this model",
    404: "there is no such model or path; the URL ends before /chat/completions, often in /v1",
}


class EndpointWriter:
    """A model behind `url`/chat/completions, asked at temperature 0. The key is taken from OPENAI_API_KEY.

    `request` is what every request has besides; its messages come before the prompt.
    """

    def __init__(
        self,
        model: str,
        url: str,
        max_new_tokens: int,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        first_wait_s: float = 1.0,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        address = httpx.URL(url)
        if address.scheme not in ("http", "https") or not address.host:
            raise UserError(f"judge openai:{model}@{url}: expected http(s)://HOST[:PORT]/v1")
        self._model, self._url, self._max_new_tokens = model, str(address).rstrip("/"), max_new_tokens
        self._besides = dict(request or {})
        self._concurrency, self._first_wait_s = concurrency, first_wait_s
        self._pace = _Pace(60 / requests_per_minute if requests_per_minute else 0)
        self._identity = f"openai:{model}@{address.host}, temperature 0, {max_new_tokens} tokens"

    @property
    def identity(self) -> str:
        """Without port and credentials: the same model behind another door is the same judge."""
        return self._identity

    def answers(self, prompts: list[str]) -> Iterator[tuple[int, str | Unanswered]]:
        """Asks `concurrency` at a time; waits and asks again where the endpoint is busy or gone for a moment."""
        key = os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self._concurrency)
        with (
            httpx.Client(headers=headers, timeout=httpx.Timeout(600, connect=10, pool=None), limits=limits) as client,
            ThreadPoolExecutor(self._concurrency) as pool,
        ):
            futures = {pool.submit(self._ask, client, prompt): number for number, prompt in enumerate(prompts)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, client: httpx.Client, prompt: str) -> str | Unanswered:
        wait, trouble = self._first_wait_s, ""
        for _ in range(_ATTEMPTS):
            self._pace.wait()
            try:
                response = client.post(f"{self._url}/chat/completions", json=self._request(prompt))
            except httpx.TransportError as error:
                trouble, asked_to_wait = type(error).__name__, None
            else:
                if response.status_code not in _TRANSIENT:
                    return self._answer(response)
                trouble, asked_to_wait = f"status {response.status_code}", _retry_after(response)
            time.sleep(asked_to_wait if asked_to_wait is not None else wait * random.uniform(0.5, 1.5))
            wait *= 2
        raise Failure(f"judge {self._identity}: {trouble} after {_ATTEMPTS} attempts; see whether {self._url} is up")

    def _request(self, prompt: str) -> dict[str, object]:
        return {
            **self._besides,
            "model": self._model,
            "messages": [*self._besides.get("messages", ()), {"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self._max_new_tokens,
        }

    def _answer(self, response: httpx.Response) -> str | Unanswered:
        if mend := _USERS_MISTAKE.get(response.status_code):
            raise UserError(f"judge {self._identity}: status {response.status_code}: {mend}")
        if response.status_code != 200:
            return Unanswered(f"the judge's endpoint: status {response.status_code}: {response.text[:200]}")
        try:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError):
            return Unanswered(f"the judge's endpoint gave no chat completion: {response.text[:200]}")
        return text if isinstance(text, str) else Unanswered(f"the judge's endpoint gave no text ({reason})")


class _Pace:
    """Lets one call through each `interval_s`."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s, self._next, self._lock = interval_s, 0.0, threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval_s
        if turn > now:
            time.sleep(turn - now)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the endpoint asks to be left alone, at most a minute."""
    try:
        return min(60.0, max(0.0, float(response.headers["retry-after"])))
    except (KeyError, ValueError):
        return None

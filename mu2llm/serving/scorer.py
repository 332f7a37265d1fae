"""`GreenScorer`: any judge of `mu2llm.green` as a deployment of its own, for the API and for batch jobs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mu2llm import logs
from mu2llm.green import Judge, load_judge
from mu2llm.records import Judgement
from mu2llm.serving.faults import where
from mu2llm.serving.refusal import Refusal
from mu2llm.settings.green import JudgeConfig

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
Pair = tuple[str, str]


class GreenScorer:
    """Loads its judge when it is first asked, so that a judge that cannot be had stops nothing else.

    `max_ongoing_requests` are taken on, one is judged at a time: what a judge does at once lies within it. Those
    beyond are refused here, so that whoever asks whether there is a replica finds one that answers.
    """

    def __init__(self, judge: dict[str, Any], max_ongoing_requests: int) -> None:
        logs.withhold()
        self.config, self.max_ongoing_requests = JudgeConfig.model_validate(judge), max_ongoing_requests
        self.judge: Judge | None = None
        self.waiting = 0
        self._thread = ThreadPoolExecutor(1)

    async def score(self, pairs: list[Pair]) -> list[Judgement] | Refusal:
        """Judgements in the order of the pairs, or why there are none."""
        if self.waiting >= self.max_ongoing_requests:
            return Refusal("busy")
        self.waiting += 1
        try:
            return await self._in_turn(lambda: self._loaded().judge(pairs))
        except Exception as error:  # whatever a judge raises: no exception leaves for Serve's log with what was judged
            logger.error("%d pairs were not judged: %s", len(pairs), where(error))
            return Refusal("down", type(error).__name__)
        finally:
            self.waiting -= 1

    async def answers(self) -> bool:
        """That there is a replica, however long its judge takes."""
        return True

    async def identity(self) -> str | Refusal:
        """The judge's, or why it cannot be had."""
        try:
            return await self._in_turn(lambda: self._loaded().identity)
        except Exception as error:
            logger.error("the judge cannot be had: %s", where(error))
            return Refusal("down", type(error).__name__)

    async def _in_turn(self, action: Callable[[], T]) -> T:
        """In the judge's own thread, after those that came before; whoever leaves while waiting is not judged."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, action)

    def _loaded(self) -> Judge:
        if self.judge is None:
            self.judge = load_judge(self.config)
        return self.judge

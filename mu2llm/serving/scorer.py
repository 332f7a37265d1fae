"""`GreenScorer`: any judge of `mu2llm.green` as a deployment of its own, for the API and for batch jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from mu2llm.config import JudgeConfig
from mu2llm.errors import Failure, UserError
from mu2llm.green import Judge, load_judge
from mu2llm.records import Judgement

Pair = tuple[str, str]


class GreenScorer:
    """Loads its judge when it is first asked, so that a judge that cannot be had stops nothing else."""

    def __init__(self, judge: dict[str, Any]) -> None:
        self.config = JudgeConfig.model_validate(judge)
        self.judge: Judge | None = None
        self._loading = asyncio.Lock()

    async def score(self, pairs: list[Pair]) -> list[Judgement] | str:
        """Judgements in the order of the pairs, or why there can be none."""
        try:
            judge = await self._judge()
            return await asyncio.to_thread(judge.judge, pairs)
        except (UserError, Failure, OSError, RuntimeError) as error:  # RuntimeError: a GPU without room
            return type(error).__name__

    async def answers(self) -> bool:
        """That there is a replica, however long its judge takes."""
        return True

    async def identity(self) -> str:
        return (await self._judge()).identity

    async def _judge(self) -> Judge:
        async with self._loading:
            if self.judge is None:
                self.judge = await asyncio.to_thread(load_judge, self.config)
        return self.judge


class ServedJudge:
    """The scorer of a running service as a judge of `mu2llm.green`, for `prefer` and `evaluate` on its cluster.

    `handle` is `serve.get_deployment_handle("GreenScorer", APPLICATION)`.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle
        self.identity: str = handle.identity.remote().result()

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """Raises Failure where the scorer cannot judge."""
        result = self.handle.score.remote(list(pairs)).result()
        if isinstance(result, str):
            raise Failure(f"the service's scorer cannot judge: {result}; see its log")
        return list(result)

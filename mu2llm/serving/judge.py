"""A running service's scorer as a judge of batch jobs on its cluster: `python:mu2llm.serving.judge:ServedJudge`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from mu2llm.errors import Failure, UserError
from mu2llm.records import Judgement
from mu2llm.serving.app import NAME
from mu2llm.serving.calls import ATTEMPTS, LOST
from mu2llm.serving.refusal import Refusal
from mu2llm.serving.scorer import Pair
from mu2llm.settings.green import JudgeConfig

PAIRS = 64  # a call, so that those of the service's clients come in between
BUSY_S = 1.0  # between two attempts at a scorer that is busy
PATIENCE_S = 600.0  # with one that stays so


class ServedJudge:
    """What it judges by is the service's business: of `config` it needs nothing."""

    def __init__(self, config: JudgeConfig) -> None:
        try:
            self._scorer = serve.get_deployment_handle("GreenScorer", NAME)
        except RayServeException as error:
            raise UserError(
                f"judge {config.name}: no service runs on this Ray; give --address of the cluster of `mu2llm serve`"
            ) from error
        self.identity: str = self._answer(self._scorer.identity)

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """Raises Failure where the scorer cannot judge."""
        judgements: list[Judgement] = []
        for start in range(0, len(pairs), PAIRS):
            judgements += self._answer(self._scorer.score, list(pairs[start : start + PAIRS]))
        return judgements

    def _answer(self, method: Any, *arguments: Any) -> Any:
        """What the scorer answers in the end: asked again where its replica died, and as long as it is busy."""
        lost, deadline = 0, time.monotonic() + PATIENCE_S
        while lost < ATTEMPTS and time.monotonic() < deadline:
            try:
                answer = method.remote(*arguments).result()
            except LOST:
                lost += 1
            except BackPressureError:
                pass
            except DeploymentUnavailableError as error:
                raise Failure("the service's scorer is not available; its log says why") from error
            else:
                if not isinstance(answer, Refusal):
                    return answer
                if answer.reason == "down":
                    raise Failure(f"the service's scorer cannot judge: {answer.message}; its log says why")
            time.sleep(BUSY_S)
        why = f"{lost} replicas died over it" if lost == ATTEMPTS else f"it was busy for {PATIENCE_S:g} s"
        raise Failure(f"the service's scorer cannot judge: {why}; run again to go on")

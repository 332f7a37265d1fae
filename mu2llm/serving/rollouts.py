"""Roll-outs: a canary answers a fraction of the scans, a shadow reads scans too and is shown to nobody.

Each is a checkpoint in replicas of its own, which scale alone. What goes wrong with one is counted, and costs no
client an answer. A scan is of a roll-out's fraction or not by what the model sees of it: all its reports come from one
checkpoint.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from ray.serve.handle import DeploymentHandle

from mu2llm import tracking
from mu2llm.artefacts import open_checkpoint, weights_of
from mu2llm.errors import UserError
from mu2llm.green import findings, load_judge
from mu2llm.records import Checkpoint, PreprocessSpec
from mu2llm.serving.calls import Calls, limit
from mu2llm.serving.decoder import Scan
from mu2llm.serving.exchange import ReportRequest, Status, Written
from mu2llm.serving.faults import where
from mu2llm.serving.metrics import Metrics
from mu2llm.serving.problems import Problem
from mu2llm.serving.refusal import Refusal
from mu2llm.serving.store import Store, StoredComparison, now
from mu2llm.settings.green import JudgeConfig
from mu2llm.settings.serving import ServingConfig

logger = logging.getLogger("ray.serve")
Role = Literal["canary", "shadow"]
LOADING = Status(False, "the model is being loaded")
MODEL = {"object": "model", "owned_by": "mu2llm", "created": 0}  # of every model, in OpenAI's list
LOOK_LIMIT_S = 2.0  # for one look at a generator
AT_ONCE = 8  # scans that an ingress holds for its shadow; others are not read by it


def check(checkpoint: str, serving: ServingConfig) -> None:
    """Raises UserError where a canary or shadow is the checkpoint that is served, or prepares scans otherwise."""
    named = [(role, uri) for role, uri in (("canary", serving.canary), ("shadow", serving.shadow)) if uri]
    if not named:
        return
    served = open_checkpoint(tracking.locate(checkpoint))
    for role, uri in named:
        other = open_checkpoint(tracking.locate(uri))
        if weights_of(other).weights == weights_of(served).weights:
            raise UserError(
                f"serving.{role}={uri} has the weights of {checkpoint}, which is served: name another, or none"
            )
        if other.lineage.spec_hash != served.lineage.spec_hash:
            raise UserError(
                f"serving.{role}={uri} prepares scans otherwise than {checkpoint}, which is served: "
                f"{_differences(other, served)}; name a checkpoint of the same preprocessing, or swap to this one by "
                "its alias (mu2llm promote), which reads scans anew"
            )


def _differences(other: Checkpoint, served: Checkpoint) -> str:
    there, here = (each.experiment["data"]["spec"] for each in (other, served))
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return ", ".join(f"data.spec.{key} is {there.get(key)}, not {here.get(key)}" for key in keys)


async def status_of(generator: Calls, seconds: float = LOOK_LIMIT_S) -> Status:
    """What one of its replicas says; one that does not answer in time is not ready."""
    try:
        async with asyncio.timeout(seconds):
            status: Status = await generator.once("status")
            return status
    except Exception as error:
        logger.info("the %s did not tell its status: %s", generator.name, type(error).__name__)
        return LOADING


def share(role: Role, key: str) -> float:
    """Where the scan of a key stands, in [0, 1): below a role's fraction it is one of its scans."""
    return int.from_bytes(hashlib.sha256(f"{role} {key}".encode()).digest()[:8]) / 2**64


def halfway(deadline: float) -> float:
    """Until when a canary may keep a request, so that another checkpoint can still answer it."""
    return (time.monotonic() + deadline) / 2


class RollOut:
    """A checkpoint beside the one that is served."""

    role: Role

    def __init__(self, calls: Calls, fraction: float, metrics: Metrics) -> None:
        self.calls, self.fraction, self.metrics = calls, fraction, metrics
        self.status = LOADING

    async def look(self) -> None:
        """Keeps `status` up to date."""
        self.status = await status_of(self.calls)

    def takes(self, scan: Scan) -> bool:
        """Whether it reads this scan: it is of its fraction, prepared as it wants it, and there is a model."""
        spec = self.status.spec
        return spec is not None and spec.hash == scan.spec_hash and share(self.role, scan.key) < self.fraction

    def described(self, served: PreprocessSpec | None) -> dict[str, Any]:
        """In OpenAI's list of models."""
        spec, why = self.status.spec, self.status.why
        if spec and served and spec.hash != served.hash:
            why = "it prepares scans otherwise than the checkpoint that is served, and reads none"
        told = {"role": self.role, "fraction": self.fraction, "ready": not why, **({"why": why} if why else {})}
        return {**MODEL, "id": self.role, **self.status.model, **told}

    def failed(self, reason: str) -> None:
        """A text that it owes."""
        logger.warning("the %s wrote no report: %s", self.role, reason)
        self.metrics.rollout_failures.inc(1, {"role": self.role, "reason": reason.split()[0]})


class Canary(RollOut):
    """Answers its fraction; what it cannot answer, the checkpoint that is served does."""

    role = "canary"

    async def write(self, request: ReportRequest, deadline: float) -> Written | None:
        """None where it could not."""
        try:
            done = await self.calls.ask("write", request, deadline=halfway(deadline))
        except Exception as error:  # whatever it is, another checkpoint answers
            self.failed(where(error))
            return None
        if isinstance(done, Refusal):
            self.failed(done.reason)
            return None
        assert isinstance(done, Written)
        return done

    async def stream(self, request: ReportRequest, deadline: float) -> AsyncIterator[str | Written]:
        """Pieces, then the report; nothing at all where it could not, and a Problem where it could not go on."""
        told, begun_by, pieces = 0, halfway(deadline), self.calls.stream(request, 0, deadline)
        try:
            while True:
                async with limit(deadline if told else begun_by):
                    piece = await anext(pieces)
                if isinstance(piece, Refusal):
                    self.failed(piece.reason)
                    break
                told += isinstance(piece, str)
                yield piece
                if isinstance(piece, Written):
                    return
        except Exception as error:
            self.failed(where(error))
        finally:
            await pieces.aclose()
        if told:
            raise Problem(503, "canary_down", "the model that wrote this failed; ask again", 2)


class Shadow(RollOut):
    """Reads its fraction besides, after the answer: what it writes is compared with it and dropped."""

    role = "shadow"

    def __init__(self, calls: Calls, fraction: float, metrics: Metrics, store: Store) -> None:
        super().__init__(calls, fraction, metrics)
        self.store, self.judge = store, load_judge(JudgeConfig(name="rules"))
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, request: ReportRequest, shown: Written, deadline: float) -> None:
        """Begins it; returns at once."""
        if len(self._tasks) >= AT_ONCE:
            self.failed("busy")
            return
        task = asyncio.create_task(self._compare(request, shown, deadline))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _compare(self, request: ReportRequest, shown: Written, deadline: float) -> None:
        try:
            written = await self.calls.ask("write", request, deadline=deadline)
            if isinstance(written, Refusal):
                self.failed(written.reason)
                return
            compared = await asyncio.to_thread(self._compared, request, shown, written)
            self._count(compared)
            await asyncio.to_thread(self.store.save_comparison, compared)
        except Exception as error:  # of replicas, judge or storage: nobody waits for it
            self.failed(where(error))

    def _compared(self, request: ReportRequest, shown: Written, written: Written) -> StoredComparison:
        (judged,) = self.judge.judge([(shown.text, written.text)])
        first, second = ({finding.name for finding in findings(each.text)} for each in (shown, written))
        return StoredComparison(
            id=request.id,
            scan_sha256=request.scan.facts["sha256"],
            shown=shown.checkpoint,
            shadow=written.checkpoint,
            green=judged.score,
            significant=sum(judged.significant),
            matched=judged.matched,
            shown_alone=tuple(sorted(first - second)),
            shadow_alone=tuple(sorted(second - first)),
            shown_tokens=shown.tokens,
            shadow_tokens=written.tokens,
            made=now(),
        )

    def _count(self, compared: StoredComparison) -> None:
        metrics = self.metrics
        metrics.reports.inc(1, {"role": self.role})
        if compared.green is not None:
            metrics.shadow_green.observe(compared.green)
        if compared.shown_tokens and compared.shadow_tokens:
            metrics.shadow_length.observe(compared.shadow_tokens / compared.shown_tokens)
        for by, alone in (("shown", compared.shown_alone), ("shadow", compared.shadow_alone)):
            if alone:
                metrics.shadow_findings.inc(len(alone), {"by": by})


def rollouts_of(
    handles: Mapping[Role, DeploymentHandle], settings: ServingConfig, store: Store, metrics: Metrics
) -> tuple[Canary | None, Shadow | None]:
    """Those that there are."""
    calls = {role: Calls(role, handle, metrics.retries) for role, handle in handles.items()}
    canary, shadow = calls.get("canary"), calls.get("shadow")
    return (
        Canary(canary, settings.canary_fraction or 0, metrics) if canary else None,
        Shadow(shadow, settings.shadow_fraction, metrics, store) if shadow else None,
    )

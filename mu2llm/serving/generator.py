"""`ReportGenerator`: holds the checkpoint, writes reports together, follows the registry."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator
from typing import Any

import torch

from mu2llm import logs, tracking
from mu2llm.engine.actors import use_cpus
from mu2llm.engine.remote import EndpointFault
from mu2llm.errors import Failure, UserError
from mu2llm.serving.batch import Queued, RunningBatch
from mu2llm.serving.exchange import InfluenceRequest, ReportRequest, Status, Written
from mu2llm.serving.faults import where
from mu2llm.serving.influence import influence
from mu2llm.serving.loaded import LoadedModel
from mu2llm.serving.queue import QueuedRequest, RequestQueue
from mu2llm.serving.refusal import Refusal
from mu2llm.settings.serving import ServingConfig

logger = logging.getLogger("ray.serve")
REGISTRY = f"registry://{tracking.MODEL}@"


class ReportGenerator:
    """Scans and questions → reports. Its `user_config` is `{"checkpoint": URI or registry://mu2llm@ALIAS}`.

    Reports are written together, up to `max_batch_size` at a time: who comes joins those that are being written, and
    who is done or has left makes room. The first checkpoint is loaded before the replica counts as running; another
    one is loaded beside it, and takes over when what the old one has begun is written: nothing is dropped. Without
    `tracking_store` the registry is the one that MLFLOW_TRACKING_URI names where the replica runs. A first checkpoint
    that cannot be loaded is a replica that never starts, so that Serve tries elsewhere and keeps what runs; `alone`, on
    one's own machine, it starts, says in its status why it cannot write, and tries again.
    """

    def __init__(self, settings: dict[str, Any], tracking_store: str | None, alone: bool) -> None:
        logs.withhold()
        if tracking_store:
            os.environ["MLFLOW_TRACKING_URI"] = tracking_store
        self.settings = ServingConfig.model_validate(settings)
        use_cpus(self.settings.inference)
        self.alone = alone
        self.source, self.why = "", "no checkpoint was loaded yet"
        self.loaded: LoadedModel | None = None
        self.failed = False  # to load what is asked for
        self.warm_up_seconds: float | None = None
        self.waiting: RequestQueue[ReportRequest] = RequestQueue()
        self.silent = ""  # why the server of its language model cannot write
        self.broken = False  # its device: only a new process can write again
        self._writer: asyncio.Task[None] | None = None
        self._loading = asyncio.Lock()
        self._influencing = asyncio.Lock()
        self._follower: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls it with the first user_config and with each new one."""
        first = not self.source
        self.source = str(user_config["checkpoint"])
        if first:
            await self._load()
            if self.loaded is None and not self.alone:
                raise Failure(f"{self.why}: {self.source}; the replica's log says more")
            self._follower = asyncio.create_task(self._follow())
        else:
            self._swap = asyncio.create_task(self._load())

    async def _follow(self) -> None:
        """Looks the model up in the registry from time to time; tries again what could not be loaded."""
        while True:
            await asyncio.sleep(self.settings.registry_seconds)
            if self.source.startswith(REGISTRY) or self.loaded is None or self.failed:
                await self._load()
            self.silent = await asyncio.to_thread(self._check_endpoint)

    def _check_endpoint(self) -> str:
        """Why the server of the language model, where there is one, cannot write now; empty: it can."""
        try:
            if self.loaded and self.loaded.endpoint:
                self.loaded.endpoint.check()
        except EndpointFault as fault:
            logger.error("%s", fault)
            return "the server of the language model cannot write"
        return ""

    async def _load(self) -> None:
        async with self._loading:
            try:
                uri = await asyncio.to_thread(tracking.locate, self.source)
                if self.loaded is not None and await asyncio.to_thread(self.loaded.is_of, uri):
                    self.failed = False
                    return
                new = await asyncio.to_thread(LoadedModel, uri, self.settings)
                seconds = await asyncio.to_thread(new.warm_up)
            except Exception as error:  # of storage, tracking server or model: this task must not end with it
                # an older checkpoint goes on writing; without one, readiness says why; it is tried again
                logger.error("checkpoint %s was not loaded: %s", self.source, error)
                self.failed = True
                self.why = f"the checkpoint could not be loaded ({type(error).__name__})"
                return
            self.loaded, self.warm_up_seconds, self.failed = new, seconds, False
            logger.info("writes with %s, warmed up in %.2f s", uri, seconds)

    async def check_health(self) -> None:
        if self._writer is not None and self._writer.done():
            raise RuntimeError("the writing loop has ended")
        if self.broken:
            raise RuntimeError("the device has failed")

    async def status(self) -> Status:
        loaded = self.loaded
        if loaded is None or self.broken or self.silent:
            return Status(False, self.silent or self.why)
        return Status(True, "", loaded.facts, loaded.spec, loaded.question(), len(self.waiting), self.warm_up_seconds)

    async def write(self, request: ReportRequest) -> Written | Refusal:
        """The whole report."""
        queued = self._admit(request)
        if isinstance(queued, Refusal):
            return queued
        try:
            result: Written | Refusal = await queued.done
            return result
        finally:
            self.waiting.leave(queued)

    async def stream(self, request: ReportRequest) -> AsyncIterator[str | Written | Refusal]:
        """Pieces of the text as they are written, then the whole report."""
        queued = self._admit(request, streamed=True)
        if isinstance(queued, Refusal):
            yield queued
            return
        try:
            async for piece in queued.pieces():
                yield piece
            yield await queued.done
        finally:
            self.waiting.leave(queued)

    async def influence(self, request: InfluenceRequest) -> list[dict[str, Any]] | Refusal:
        """What each sentence of a report depended on: text, start, end, nifti in base64. One request at a time, beside
        what is written; no further for one who no longer waits."""
        gone = threading.Event()
        async with self._influencing:
            loaded = self.loaded
            if loaded is None or self.broken:
                return Refusal("not_ready", self.why)
            if request.scan.spec_hash != loaded.spec.hash:
                return Refusal("wrong_spec")
            if request.model != loaded.facts["id"]:
                return Refusal("another_model")
            try:
                return await asyncio.to_thread(influence, loaded, request, gone)
            except asyncio.CancelledError:
                gone.set()
                raise
            except UserError:
                return Refusal("too_long")
            except Exception as error:  # no exception leaves for Serve's log with what a client sent
                return Refusal("broken", where(error))

    def _admit(self, request: ReportRequest, streamed: bool = False) -> Queued | Refusal:
        loaded = self.loaded
        if loaded is None or self.broken:
            return Refusal("not_ready", self.why)
        if request.scan.spec_hash != loaded.spec.hash:
            return Refusal("wrong_spec")
        try:
            decoding = loaded.decoding(request)
        except UserError:
            return Refusal("too_long")
        except Exception as error:  # no exception leaves for Serve's log with what a client sent
            return Refusal("broken", where(error))
        if decoding is None:
            return Refusal("too_long")
        if self._writer is None:
            self._writer = asyncio.create_task(self._work())
        return self.waiting.add(QueuedRequest(request, decoding, streamed))

    async def _work(self) -> None:
        while True:
            await self.waiting.arrival()
            await asyncio.to_thread(self._write)

    def _write(self) -> None:
        """Writes what waits, in a thread, until nobody waits."""
        while len(self.waiting):
            assert self.loaded is not None
            batch = RunningBatch(self.loaded)
            try:
                self._together(batch)
            except Exception as error:
                self._alone(batch.taken, error)

    def _together(self, batch: RunningBatch) -> None:
        """Until the batch is empty; others join it, as long as it is of the checkpoint that is to write."""
        while True:
            if self.loaded is batch.loaded and batch.open:
                batch.join(self.waiting.take(self.settings.max_batch_size - len(batch)))
            if not len(batch):
                return
            batch.step()

    def _alone(self, taken: list[Queued], error: Exception) -> None:
        """One that cannot be written fails alone; what is over is not written again."""
        logger.warning("writing %d reports together failed, each by itself now: %s", len(taken), where(error))
        for queued in [queued for queued in taken if not queued.answered and not queued.abandoned]:
            assert self.loaded is not None
            batch = RunningBatch(self.loaded)
            try:
                batch.join([queued])
                while len(batch):
                    batch.step()
            except Exception as failed:
                if isinstance(failed, torch.AcceleratorError):
                    self.broken, self.why = True, "its device failed, and another replica takes over"
                queued.finish(Refusal("not_ready", self.why) if self.broken else Refusal("broken", where(failed)))

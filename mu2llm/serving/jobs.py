"""Reports in the background. A job lies in storage before it is accepted, so it survives whatever happens to us.

Whoever works at a job renews its `beat`; one whose beat is old is taken over. Two that take over the same job at
once both make the same report: storage needs no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial

from mu2llm.errors import Failure
from mu2llm.serving.admission import ANYBODY, Body
from mu2llm.serving.faults import where
from mu2llm.serving.problems import Problem, internal, storage_failed
from mu2llm.serving.schemas import Job, ReportOptions
from mu2llm.serving.service import Service, Upload
from mu2llm.serving.store import StoredJob, now

logger = logging.getLogger("ray.serve")
BEAT_S = 5.0
LOST = timedelta(seconds=4 * BEAT_S)  # without a beat
LOOK_S = 5.0  # between two looks for jobs that others left
MAX_ATTEMPTS = 5


class Jobs:
    def __init__(self, service: Service) -> None:
        self.service, self.store = service, service.store
        self.owner = uuid.uuid4().hex
        self._arriving = 0
        self._wake = asyncio.Event()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._loop = asyncio.create_task(self._work())

    async def stop(self) -> None:
        for task in [self._loop, *self._running.values()]:
            if task:
                task.cancel()

    @contextlib.asynccontextmanager
    async def admitted(self, size: int, key: str = ANYBODY) -> AsyncIterator[Body]:
        """Answers 429 before an upload of `size` bytes is read, where too many jobs wait or are on their way."""
        with self.service.bodies.holding(size, key) as body:
            self._arriving += 1
            try:
                waiting = len(await asyncio.to_thread(self.store.open_ids))
                if waiting + self._arriving > self.service.settings.max_queued_requests:
                    raise Problem(429, "busy", "too many jobs wait; try again later", 30)
                yield body
            finally:
                self._arriving -= 1

    async def add(self, upload: Upload, options: ReportOptions, principal: str = "") -> Job:
        """Stores it, in the name of who asks; it is begun when there is room."""
        if upload.uri is not None:
            self.service.allowed(upload.uri)
        time = now().isoformat(timespec="milliseconds")
        job = Job(id=uuid.uuid4().hex, status="queued", created=time, updated=time)
        stored = StoredJob(
            job=job,
            principal=principal,
            options=options.model_copy(update={"stream": False}),
            uri=upload.uri,
            files=len(upload.files),
            beat=now() - 2 * LOST,
        )
        await asyncio.to_thread(self.store.add_job, stored, list(upload.files))
        self._wake.set()
        return job

    async def get(self, identity: str) -> Job:
        return (await asyncio.to_thread(self.store.job, identity)).job

    async def _work(self) -> None:
        while True:
            try:
                await self._begin()
            except Exception as error:  # storage that fails now: the next look finds the same jobs
                logger.error("looking for jobs failed: %s", type(error).__name__)
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()

    async def _begin(self) -> None:
        """Takes what is queued, and what others left, as far as there is room and a model."""
        if not self.service.status.ready:
            return
        for stored in await asyncio.to_thread(self.store.open_jobs):
            if len(self._running) >= self.service.settings.jobs_at_once:
                return
            if stored.job.id not in self._running and now() - stored.beat > LOST:
                task = asyncio.create_task(self._run(stored))
                self._running[stored.job.id] = task
                task.add_done_callback(partial(self._ended, stored.job.id))

    def _ended(self, identity: str, _: asyncio.Task[None]) -> None:
        self._running.pop(identity, None)
        self._wake.set()

    async def _run(self, stored: StoredJob) -> None:
        if stored.job.status in ("queued", "running"):
            stored = await self._save(stored, status="running", attempts=stored.job.attempts + 1)
            result = await self._made(stored)
            stored = await self._save(stored, **result)
        if stored.job.status != "queued":
            await asyncio.to_thread(self.store.close_job, stored)

    async def _made(self, stored: StoredJob) -> dict[str, object]:
        """The report, or why there is none, as the job's new values; the beat goes on meanwhile."""
        over = asyncio.Event()
        beating = asyncio.create_task(self._beat(stored, over))
        try:
            if stored.job.attempts > MAX_ATTEMPTS:
                raise Problem(500, "internal", f"it was begun {MAX_ATTEMPTS} times and never came to an end")
            files = tuple(await asyncio.to_thread(self.store.upload, stored))
            seconds = self.service.settings.job_seconds
            upload = Upload(files, stored.uri)
            work = self.service.begin(upload, stored.options, seconds=seconds, principal=stored.principal)
            return {"status": "done", "report": (await self.service.report(work)).report}
        except Problem as problem:
            told = problem
        except (Failure, OSError):
            told = storage_failed()
        except Exception as error:  # asyncio would log its message, which may hold what a client sent
            logger.error("a job failed: %s", where(error))
            told = internal()
        finally:
            over.set()
            await beating  # a beat after the end would say that it still runs
        if told.status in (429, 503) and stored.job.attempts < MAX_ATTEMPTS:
            return {"status": "queued"}
        return {"status": "failed", "problem": told.body()}

    async def _beat(self, stored: StoredJob, over: asyncio.Event) -> None:
        while not over.is_set():
            try:
                async with asyncio.timeout(BEAT_S):
                    await over.wait()
            except TimeoutError:
                await self._save(stored)

    async def _save(self, stored: StoredJob, **changes: object) -> StoredJob:
        job = stored.job.model_copy(update={**changes, "updated": now().isoformat(timespec="milliseconds")})
        saved = stored.model_copy(update={"job": job, "owner": self.owner, "beat": now()})
        await asyncio.to_thread(self.store.save_job, saved)
        return saved

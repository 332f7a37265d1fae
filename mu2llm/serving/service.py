"""What the service does, without HTTP: read, write, judge; admission, retries, time limits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ray.serve.handle import DeploymentHandle

from mu2llm.errors import Failure, Rejection
from mu2llm.green import findings
from mu2llm.model.familiarity import unlike
from mu2llm.records import Judgement, PreprocessSpec
from mu2llm.serving import dicomweb
from mu2llm.serving.admission import ANYBODY, Bodies, Body
from mu2llm.serving.calls import ATTEMPTS, Calls, back_off
from mu2llm.serving.decoder import Reading, References, Scan
from mu2llm.serving.drafts import Drafts
from mu2llm.serving.exchange import InfluenceRequest, ReportRequest, Status, Written
from mu2llm.serving.guard import MAX_TEXTS
from mu2llm.serving.metrics import Metrics, counted
from mu2llm.serving.problems import Problem, internal, not_ready, rejected
from mu2llm.serving.quarantine import CarefulReader
from mu2llm.serving.refusal import Refusal
from mu2llm.serving.rollouts import LOADING, MODEL, Role, rollouts_of, status_of
from mu2llm.serving.scans import Scans
from mu2llm.serving.schemas import (
    FamiliarityOut,
    FindingOut,
    GreenAnswer,
    GreenResult,
    InfluenceAnswer,
    ModelFacts,
    PairIn,
    Report,
    ReportOptions,
    ScanFacts,
    SentenceInfluence,
    SpecFacts,
)
from mu2llm.serving.store import Store, StoredReport
from mu2llm.serving.uris import allowed
from mu2llm.settings.serving import ServingConfig

logger = logging.getLogger("ray.serve")
TEXTS_AT_ONCE = 16  # bodies of texts of the largest size
LOOK_S = 0.5  # between two looks at the generator
FIRST_LOOK_S = 10.0  # for the first one
GRACE_S = 30.0  # for which a generator that was ready may be silent or not ready (a replica is being replaced)
SCORER_WAIT_S = 60.0  # scaled to zero, it needs time to come up
SCORER_SILENT_S = 5.0


@dataclass(frozen=True)
class Upload:
    """A scan as it was sent: the bytes of one file, or of several of one DICOM series, or an allowed URI."""

    files: tuple[bytes, ...] = ()
    uri: str | None = None

    @property
    def size(self) -> int:
        return sum(len(data) for data in self.files)

    @property
    def source(self) -> list[bytes] | str:
        return self.uri if self.uri is not None else list(self.files)


@dataclass(frozen=True)
class Made:
    """A report, and which DICOM instances it is about, where that was asked for."""

    report: Report
    references: References | None


@dataclass(frozen=True)
class Work:
    """A report request on its way."""

    upload: Upload
    options: ReportOptions
    references: bool
    deadline: float
    dicom_only: bool = False
    principal: str = ""
    started: float = field(default_factory=time.monotonic)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Service:
    """One per ingress replica. `start` must run in the event loop that serves the requests."""

    def __init__(
        self,
        reader: DeploymentHandle,
        generator: DeploymentHandle,
        scorer: DeploymentHandle,
        settings: ServingConfig,
        rollouts: Mapping[Role, DeploymentHandle] = MappingProxyType({}),
    ) -> None:
        self.settings = settings
        self.store = Store(settings.state, settings.keep_scans, settings.keep_reports_days, settings.keep_inputs)
        self.scans = Scans(settings.state, settings.scan_minutes, settings.max_scans)
        self.metrics = Metrics()
        self.drafts = Drafts(self.store, self.metrics)
        retries = self.metrics.retries
        self.reader = CarefulReader(Calls("reader", reader, retries), self.store)
        self.generator, self.scorer = Calls("generator", generator, retries), Calls("scorer", scorer, retries)
        self.canary, self.shadow = rollouts_of(rollouts, settings, self.store, self.metrics)
        self.status = LOADING
        self._spec: PreprocessSpec | None = None  # the last that is known, for those who were let in
        self._seen = float("-inf")
        self.bodies = Bodies(2 * settings.max_body_mb * 2**20, settings.max_queued_requests)
        self.texts = Bodies(TEXTS_AT_ONCE * MAX_TEXTS, settings.max_queued_requests)  # beside them
        self._busy = 0
        self._pace = 1.0  # seconds between two finished reports, smoothed
        self._last_finished = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Returns when the generator has told how it is: a replica that takes the place of another would turn away who
        asks it before that. Where the generator is still being loaded, after `FIRST_LOOK_S`."""
        if self.settings.keep_inputs:
            logger.warning(
                "serving.keep_inputs: what the model sees of a scan is kept under %s/corrections where its report is "
                "corrected, which needs the patient's consent; DELETE /v1/drafts/ID takes it back",
                self.settings.state,
            )
        self._learn(await status_of(self.generator, FIRST_LOOK_S))
        self._tasks = [asyncio.create_task(self._look()), asyncio.create_task(self._forget())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self.shadow:
            self.shadow.stop()

    def models(self) -> list[dict[str, Any]]:
        """The checkpoint that writes, and those of the roll-outs, in OpenAI's form, with their `role`."""
        served = {**MODEL, **self.status.model, "role": "served"}
        return ([served] if self.status.model else []) + [
            each.described(self._spec) for each in (self.canary, self.shadow) if each
        ]

    # ---- readiness and admission

    async def _look(self) -> None:
        """Keeps `status` up to date."""
        while True:
            looks = asyncio.gather(*(each.look() for each in (self.canary, self.shadow) if each))
            self._learn(await status_of(self.generator))
            await looks
            self.metrics.ready.set(int(self.status.ready))
            self.metrics.waiting.set(self.status.waiting)
            await asyncio.sleep(LOOK_S)

    def _learn(self, told: Status) -> None:
        """What one replica says: that it is not ready says nothing of others that were a moment ago."""
        if told.ready:
            self.status, self._spec, self._seen = told, told.spec, time.monotonic()
        elif time.monotonic() - self._seen > GRACE_S:
            self.status = told

    async def _forget(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.store.forget_old)
                await asyncio.to_thread(self.scans.forget_old)
                await self.reader.learn()
            except (Failure, OSError) as error:
                logger.warning("what is old was not deleted, which is tried again: %s", type(error).__name__)
            await asyncio.sleep(min(3600.0, 15 * self.settings.scan_minutes))  # a quarter of a scan's time

    @contextlib.contextmanager
    def admitted(self, size: int = 0, key: str = ANYBODY) -> Iterator[Body]:
        """Takes a report request on, or answers 429 or 503 at once; `size` is its body's in bytes, as announced."""
        if not self.status.ready:
            raise not_ready(self.status.why)
        if self._busy >= self.settings.max_queued_requests:
            wait = min(60.0, max(1.0, self._busy * self._pace / 2))
            raise Problem(429, "busy", f"{self._busy} reports are being made; try again in {wait:.0f} s", wait)
        with self.bodies.holding(size, key) as body:
            self._busy += 1
            self.metrics.busy.set(self._busy)
            try:
                yield body
            finally:
                self._busy -= 1
                self.metrics.busy.set(self._busy)

    # ---- reports

    def begin(
        self,
        upload: Upload,
        options: ReportOptions,
        references: bool = False,
        dicom_only: bool = False,
        seconds: float | None = None,
        principal: str = "",
    ) -> Work:
        """A Problem where the URI is not allowed. `references` asks which DICOM instances the scan is made of,
        `dicom_only` refuses one that has none. `seconds` instead of `serving.request_seconds`; `principal` asks."""
        if upload.uri is not None:
            upload = Upload(uri=self.allowed(upload.uri))
        deadline = time.monotonic() + (seconds or self.settings.request_seconds)
        return Work(upload, options, references, deadline, dicom_only, principal)

    def allowed(self, uri: str) -> str:
        """The URI, if a client may name it; else a Problem."""
        if dicomweb.is_one(uri):
            return dicomweb.allowed(uri, self.settings.dicomweb)
        return allowed(uri, self.settings.allowed_uris)

    async def report(self, work: Work) -> Made:
        """The whole report; a Problem where there is none."""
        scan = await self.read(work)
        if self.canary and self.canary.takes(scan):
            written = await self.canary.write(_request(work, scan), work.deadline)
            if written:
                return await self._made(work, scan, written, "canary")
        for attempt in range(ATTEMPTS):
            done = await self.generator.ask("write", _request(work, scan), deadline=work.deadline)
            if isinstance(done, Written):
                return await self._made(work, scan, done)
            scan = await self._again(work, scan, done, attempt)
        raise not_ready("the model is being swapped")

    async def read(self, work: Work) -> Scan:
        """The scan as the model wants it; a Problem where it cannot be used."""
        if self._spec is None:
            raise not_ready(self.status.why)
        reading = Reading(work.upload.source, self._spec, work.options.accept, work.references)
        result = await self.reader.read(reading, work.deadline)
        if isinstance(result, Refusal):
            self.metrics.rejections.inc(1, {"reason": result.reason})
            raise _refused(result, self.settings)
        assert isinstance(result, Scan)
        if work.dicom_only and result.references is None:
            raise Problem(
                406, "not_dicom", "an SR belongs to DICOM images: send the DICOM series itself, or accept JSON"
            )
        return result

    async def stream(self, work: Work, scan: Scan) -> AsyncIterator[str | Made]:
        """The text piece by piece as it is written, and last the report."""
        told = 0
        if self.canary and self.canary.takes(scan):
            async for part in self.canary.stream(_request(work, scan), work.deadline):
                if isinstance(part, Written):
                    yield await self._made(work, scan, part, "canary")
                    return
                yield part
        for attempt in range(ATTEMPTS):
            async for piece in self.generator.stream(_request(work, scan), told, work.deadline):
                if isinstance(piece, Written):
                    yield await self._made(work, scan, piece)
                    return
                if isinstance(piece, Refusal):
                    scan = await self._again(work, scan, piece, attempt)
                else:
                    told += len(piece)
                    yield piece
        raise not_ready("the model is being swapped")

    async def _again(self, work: Work, scan: Scan, refusal: Refusal, attempt: int) -> Scan:
        """The scan for another attempt, as the model wants it now; raises for what no attempt would mend."""
        if refusal.reason == "too_long":
            raise Problem(422, "too_long", "the question is too long for the model, or spells out its special tokens")
        if refusal.reason == "broken":
            logger.error("a report could not be written: %s", refusal.message)
            raise internal()
        if refusal.reason.startswith("engine_"):
            logger.error("the server of the language model wrote no report: %s", refusal.message)
            if attempt or refusal.reason == "engine_refused":
                raise Problem(503, refusal.reason, "the server of the language model wrote no report; try again", 5)
            self.metrics.retries.inc(1, {"called": "vllm"})
            await back_off(attempt)
            return scan
        if refusal.reason == "not_ready":  # another replica may be
            if attempt + 1 == ATTEMPTS:
                raise not_ready(refusal.message)
            await back_off(attempt)
            return scan
        self._learn(await self.generator.ask("status"))
        if self._spec and self._spec.hash == scan.spec_hash:  # told by a replica that still has the other model
            await back_off(attempt)
        return await self.read(work)

    async def _made(self, work: Work, scan: Scan, written: Written, role: str = "served") -> Made:
        report = _report(work, scan, written)
        files = list(work.upload.files)
        try:
            volume = work.upload.uri or (await asyncio.to_thread(self.store.keep_scan, files) if files else None)
            await asyncio.to_thread(
                self.store.save_report, report, volume, written.checkpoint, scan.key, work.principal
            )
            await asyncio.to_thread(self.store.hold_input, report.id, scan)
        except (Failure, OSError) as error:  # the report is worth more than its record: it can be corrected by its text
            self.metrics.unsaved.inc()
            logger.error("a report was given but could not be saved: %s", type(error).__name__)
        self._count(report, written)
        self.metrics.reports.inc(1, {"role": role})
        if self.shadow and self.shadow.takes(scan):
            self.shadow.follow(_request(work, scan), written, time.monotonic() + self.settings.request_seconds)
        return Made(report, scan.references)

    def _count(self, report: Report, written: Written) -> None:
        metrics, ended = self.metrics, time.monotonic()
        for step, seconds in report.seconds.items():
            metrics.seconds.observe(seconds, {"step": step})
        metrics.batch.observe(written.batch)
        counted(metrics.tokens, written.tokens)
        metrics.rate.observe(written.tokens / max(written.seconds["write"], 1e-6))
        counted(metrics.cached, int(written.cached))
        self._pace = 0.8 * self._pace + 0.2 * min(ended - self._last_finished, 60.0)
        self._last_finished = self._seen = ended

    # ---- influence

    async def influence(self, work: Work, draft: StoredReport) -> InfluenceAnswer:
        """What each sentence of a draft depended on in its scan; a Problem (409) for another scan, or where the model
        that wrote it does not run."""
        scan = await self.read(work)
        if scan.facts["sha256"] != draft.scan_sha256:
            raise Problem(409, "another_scan", "the draft is of another scan; name the one that it was made of")
        model = draft.model.id if draft.model else ""
        canary = self.canary if self.canary and self.canary.status.model.get("id") == model else None
        writer = canary.calls if canary else self.generator
        for attempt in range(ATTEMPTS):
            asked = InfluenceRequest(scan, draft.question, draft.text, model)
            found = await writer.ask("influence", asked, deadline=work.deadline)
            if not isinstance(found, Refusal):
                sentences = [SentenceInfluence(**each) for each in found]
                return InfluenceAnswer(sentences=sentences, seconds=round(time.monotonic() - work.started, 4))
            if found.reason == "another_model":
                raise Problem(409, "another_model", "another model runs now than wrote the draft; make a new report")
            scan = await self._again(work, scan, found, attempt)
        raise not_ready("the model is being swapped")

    # ---- GREEN

    async def green(self, pairs: list[PairIn]) -> GreenAnswer:
        if len(pairs) > self.settings.max_pairs:
            raise Problem(413, "too_many_pairs", f"{len(pairs)} pairs; one request takes {self.settings.max_pairs}")
        try:
            async with asyncio.timeout(SCORER_SILENT_S if self.settings.scorer.min_replicas else SCORER_WAIT_S):
                await self.scorer.ask("answers")
        except TimeoutError:
            raise self.scorer.down() from None
        texts = [(pair.reference, pair.candidate) for pair in pairs]
        deadline = time.monotonic() + self.settings.request_seconds
        result = await self.scorer.ask("score", texts, deadline=deadline)
        if not isinstance(result, Refusal):
            return self._judged(result)
        if result.reason == "busy":
            raise Problem(429, "busy", "too many pairs wait to be judged; try again in a moment", SCORER_SILENT_S)
        raise self.scorer.down()

    def _judged(self, judgements: list[Judgement]) -> GreenAnswer:
        scores = [judgement.score for judgement in judgements if judgement.score is not None]
        for score in scores:
            self.metrics.green.observe(score)
        counted(self.metrics.invalid, len(judgements) - len(scores))
        return GreenAnswer(
            results=[GreenResult.of(judgement) for judgement in judgements],
            mean=sum(scores) / len(scores) if scores else None,
            n_valid=len(scores),
            n_invalid=len(judgements) - len(scores),
            n_failed=sum(judgement.failed for judgement in judgements),
        )


def _request(work: Work, scan: Scan) -> ReportRequest:
    taken = ("question", "region", "max_new_tokens", "temperature", "top_p", "seed", "stop")
    return ReportRequest(id=work.id, scan=scan, **{name: getattr(work.options, name) for name in taken})


def _refused(refusal: Refusal, settings: ServingConfig) -> Problem:
    if refusal.reason == "slow":
        limit = settings.reading_seconds
        return Problem(422, "slow", f"reading the scan took more than {limit:g} s; is the file sound?")
    if refusal.reason == "storage":
        return Problem(503, "storage", "the storage behind the URI cannot be reached or refuses", 5)
    if refusal.reason == "unreadable":
        return Problem(422, "undecodable", "the scan broke its decoder; check the file with mu2llm inspect")
    return rejected(Rejection("", refusal.reason, refusal.message))


def _report(work: Work, scan: Scan, written: Written) -> Report:
    seconds = {"read": scan.seconds, **written.seconds, "total": time.monotonic() - work.started}
    far = written.percentile
    return Report(
        id=work.id,
        report=written.text,
        findings=[FindingOut(**finding.model_dump()) for finding in findings(written.text)],
        model=ModelFacts.model_validate(written.model),
        spec=SpecFacts.model_validate(written.spec),
        scan=ScanFacts.model_validate(scan.facts),
        question=written.question,
        finished=written.finished,
        tokens=written.tokens,
        prompt_tokens=written.prompt_tokens,
        seconds={step: round(value, 4) for step, value in seconds.items()},
        familiarity=None if far is None else FamiliarityOut(percentile=far, unlike=unlike(far)),
        finding_probabilities=written.finding_probabilities,
    )

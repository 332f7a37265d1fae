"""What outlives a request, as files under `serving.state`: drafts, corrections with the inputs that are kept for them,
jobs with their uploads, the audit log."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, field_validator

from mu2llm import storage
from mu2llm.ct import sources
from mu2llm.engine import kept_inputs
from mu2llm.engine.kept_inputs import KeptInput
from mu2llm.records import Correction
from mu2llm.serving import audit
from mu2llm.serving.audit import Entry
from mu2llm.serving.decoder import Scan
from mu2llm.serving.problems import Problem
from mu2llm.serving.schemas import DraftState, Job, ModelFacts, Report, ReportOptions, ScanFacts

ORPHANED = timedelta(hours=1)  # since the last file of an upload without a job was stored
_ID = re.compile(r"[0-9a-f]{32}")


class StoredReport(BaseModel):
    """A draft: what was generated, by whom, and what became of it. Older ones have no more than what was generated."""

    id: str
    text: str
    question: str
    scan_sha256: str
    volume: str | None
    checkpoint: str
    spec_hash: str
    input_key: str = ""
    made: datetime
    made_by: str = ""
    state: DraftState = "generated"
    edited: str | None = None
    changed: datetime | None = None
    changed_by: str = ""
    model: ModelFacts | None = None
    scan: ScanFacts | None = None

    @property
    def decided(self) -> bool:
        return self.state in ("accepted", "rejected")

    @property
    def current(self) -> str:
        """Its text as it is now."""
        return self.text if self.edited is None else self.edited


class StoredComparison(BaseModel):
    """A shadow's text beside the report `id` that was shown, without either: GREEN by the rules with the shown one as
    the reference, the findings that one of both alone tells, the lengths in tokens."""

    id: str
    scan_sha256: str
    shown: str
    shadow: str
    green: float | None
    significant: int
    matched: int
    shown_alone: tuple[str, ...]
    shadow_alone: tuple[str, ...]
    shown_tokens: int
    shadow_tokens: int
    made: datetime


class StoredJob(BaseModel):
    """A job, what it is to do, and who is at it. `files` is the number of uploaded files, kept until it is done;
    `principal` asked for it."""

    job: Job
    principal: str = ""
    options: ReportOptions
    uri: str | None = None
    files: int = 0
    owner: str = ""
    beat: datetime

    @field_validator("options", mode="before")
    @classmethod
    def _known(cls, options: object) -> object:
        """Without what a job of an older version was asked and none is any more (`saliency`)."""
        known = ReportOptions.model_fields
        return {k: v for k, v in options.items() if k in known} if isinstance(options, dict) else options


def now() -> datetime:
    return datetime.now(UTC)


class Store:
    """Every method does storage and may take its time: call it from a thread."""

    def __init__(self, state: str, keep_scans: str | None, keep_days: float, keep_inputs: bool = False) -> None:
        self.state, self.keep_scans, self.keep = state, keep_scans, timedelta(days=keep_days)
        self.keep_inputs, self.corrections = keep_inputs, storage.join(state, "corrections")

    # ---- reports and corrections

    def save_report(
        self, report: Report, volume: str | None, checkpoint: str, input_key: str, principal: str = ""
    ) -> None:
        """The draft, behind its entry in the audit log."""
        entry = Entry(
            principal=principal,
            action="generated",
            about=report.id,
            checkpoint=checkpoint,
            scan_sha256=report.scan.sha256,
            text_sha256=audit.sha256_of(report.report),
        )
        self.add_entry(entry)
        stored = StoredReport(
            id=report.id,
            text=report.report,
            question=report.question,
            scan_sha256=report.scan.sha256,
            volume=volume,
            checkpoint=checkpoint,
            spec_hash=report.spec.hash,
            input_key=input_key,
            made=now(),
            made_by=principal,
            model=report.model,
            scan=report.scan,
        )
        self.replace_report(stored)

    def replace_report(self, stored: StoredReport) -> None:
        self._write(self._at("reports", stored.id), stored)

    def report(self, identity: str) -> StoredReport:
        """A 404 where there is none."""
        return StoredReport.model_validate(self._read("reports", identity))

    def delete_report(self, identity: str, principal: str) -> None:
        """The draft, its corrections and what was kept of its scan's input, behind the entry; a 404 where there is
        nothing of it. The draft goes last: what broke off is deleted when asked again."""
        if not _ID.fullmatch(identity):
            raise _nothing("reports")
        held, kept = self._held(identity), kept_inputs.place(self.corrections, identity)
        shadow, report = (self._at(kind, identity) for kind in ("shadow", "reports"))
        uris = [held, kept, *self._corrections_of(identity), shadow, report]
        there = [uri for uri in uris if storage.exists(uri)]
        if not there:
            raise _nothing("reports")
        self.add_entry(Entry(principal=principal, action="deleted", about=identity))
        for uri in there:
            storage.delete(uri)

    def save_comparison(self, comparison: StoredComparison) -> None:
        """Unless its report is gone: deleted meanwhile, or never saved."""
        if storage.exists(self._at("reports", comparison.id)):
            self._write(self._at("shadow", comparison.id), comparison)

    def save_correction(self, correction: Correction) -> None:
        """Under a name by which it is found by its draft, where it is of one."""
        name = f"{correction.report_id}-{correction.id}" if correction.report_id else correction.id
        uri = storage.join(self.corrections, f"{name}.jsonl")
        storage.write_bytes(uri, (correction.model_dump_json() + "\n").encode())

    def _corrections_of(self, report_id: str) -> list[str]:
        """Their URIs. Older ones, and those of texts that were sent, have no draft's id in their name and are read."""
        found = []
        for info in storage.list_files(self.corrections, recursive=False):
            uri, name = storage.join(self.corrections, info.base_name), info.base_name.removesuffix(".jsonl")
            of = name.partition("-")[0]
            if _ID.fullmatch(name):
                of = Correction.model_validate_json(storage.read_bytes(uri)).report_id
            found += [uri] if of == report_id else []
        return found

    # ---- inputs of scans, by consent (`serving.keep_inputs`)

    def hold_input(self, report_id: str, scan: Scan) -> None:
        """What the model saw, until its draft is decided or too old to be corrected."""
        if self.keep_inputs:
            kept_inputs.write(self._held(report_id), KeptInput(scan.voxels, scan.chunk_mask, scan.spec_hash))

    def keep_input(self, report_id: str) -> None:
        """Beside the correction of the draft, which is stored: nothing is kept for longer without one."""
        if self.keep_inputs and storage.exists(self._held(report_id)):
            storage.copy(self._held(report_id), kept_inputs.place(self.corrections, report_id))
            self.let_input_go(report_id)

    def let_input_go(self, report_id: str) -> None:
        storage.delete(self._held(report_id))

    def _held(self, report_id: str) -> str:
        return storage.join(self.state, "inputs", f"{report_id}.parquet")

    # ---- the audit log, kept scans

    def add_entry(self, entry: Entry) -> None:
        audit.append(self.state, entry)

    def keep_scan(self, files: list[bytes]) -> str | None:
        """The URI under which an upload is kept, where that was chosen (`serving.keep_scans`)."""
        if self.keep_scans is None:
            return None
        digest = hashlib.sha256()
        for data in files:
            digest.update(data)
        uri = storage.join(self.keep_scans, digest.hexdigest())
        if len(files) > 1:  # files of one DICOM series: a folder
            for number, data in enumerate(files):
                storage.write_bytes(storage.join(uri, f"{number:05d}.dcm"), data)
            return uri
        uri += sources.suffix_of(files[0][:1024])
        if not storage.exists(uri):
            storage.write_bytes(uri, files[0])
        return uri

    # ---- scans that are kept out

    def add_quarantined(self, digest: str) -> None:
        storage.write_bytes(storage.join(self.state, "quarantine", digest), b"")

    def quarantined(self) -> set[str]:
        """Their digests."""
        return {info.base_name for info in storage.list_files(storage.join(self.state, "quarantine"), recursive=False)}

    # ---- what is old

    def forget_old(self) -> int:
        """Deletes what is older than `serving.keep_reports_days` of reports and their inputs, finished jobs and digests
        of what is kept out, and uploads of no job; how many."""
        unfinished = set(self.open_ids())
        gone = [orphan for orphan in self._orphans() if orphan.rsplit("/", 1)[-1] not in unfinished]
        kinds = {"reports": "json", "shadow": "json", "inputs": "parquet", "jobs": "json", "quarantine": ""}
        for kind, kept_as in kinds.items():
            folder = storage.join(self.state, kind)
            for info in storage.list_files(folder, recursive=False):
                identity, _, suffix = info.base_name.partition(".")
                old = info.mtime and now() - info.mtime > self.keep
                if suffix == kept_as and old and identity not in unfinished:
                    gone.append(storage.join(folder, info.base_name))
        for uri in gone:
            storage.delete(uri)
        return len(gone)

    def _orphans(self) -> list[str]:
        """Folders of uploads that have been lying for a while: without an open job, what stored them has died."""
        folder, newest = storage.join(self.state, "uploads"), dict[str, datetime]()
        for info in storage.list_files(folder):
            identity = info.path.rsplit("/", 2)[-2]
            newest[identity] = max(info.mtime or now(), newest.get(identity, info.mtime or now()))
        return [storage.join(folder, identity) for identity, time in newest.items() if now() - time > ORPHANED]

    # ---- jobs

    def add_job(self, stored: StoredJob, files: list[bytes]) -> None:
        """The upload, the entry in the audit log and the job before its mark among the open ones: what is listed there
        is whole."""
        for number, data in enumerate(files):
            storage.write_bytes(self._upload(stored.job.id, number), data)
        self.add_entry(Entry(principal=stored.principal, action="job", about=stored.job.id))
        self.save_job(stored)
        storage.write_bytes(storage.join(self.state, "open", stored.job.id), b"")

    def save_job(self, stored: StoredJob) -> None:
        self._write(self._at("jobs", stored.job.id), stored)

    def job(self, identity: str) -> StoredJob:
        """A 404 where there is none."""
        return StoredJob.model_validate(self._read("jobs", identity))

    def open_ids(self) -> list[str]:
        """Of the jobs that are not finished."""
        files = storage.list_files(storage.join(self.state, "open"), recursive=False)
        return [info.base_name for info in files if _ID.fullmatch(info.base_name)]

    def open_jobs(self) -> list[StoredJob]:
        """Those that are not finished, the oldest first."""
        return sorted((self.job(identity) for identity in self.open_ids()), key=lambda stored: stored.job.created)

    def upload(self, stored: StoredJob) -> list[bytes]:
        return [storage.read_bytes(self._upload(stored.job.id, number)) for number in range(stored.files)]

    def close_job(self, stored: StoredJob) -> None:
        """It is finished and saved: its upload goes, and it is looked for no more."""
        storage.delete(storage.join(self.state, "uploads", stored.job.id))
        storage.delete(storage.join(self.state, "open", stored.job.id))

    def _upload(self, identity: str, number: int) -> str:
        return storage.join(self.state, "uploads", identity, f"{number:05d}")

    def _at(self, kind: str, identity: str) -> str:
        return storage.join(self.state, kind, f"{identity}.json")

    def _read(self, kind: str, identity: str) -> object:
        uri = self._at(kind, identity)
        if not _ID.fullmatch(identity) or not storage.exists(uri):
            raise _nothing(kind)
        return storage.read_json(uri)

    @staticmethod
    def _write(uri: str, value: BaseModel) -> None:
        storage.write_bytes(uri, value.model_dump_json().encode())


def _nothing(kind: str) -> Problem:
    return Problem(404, "not_found", f"there is nothing under this id in {kind}")

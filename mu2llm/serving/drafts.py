"""What becomes of a draft: generated → edited → accepted or rejected; every step has its principal and audit entry.

The entry is written before the step: what is stored can never lack one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from weakref import WeakValueDictionary

from mu2llm.green import findings
from mu2llm.records import Correction
from mu2llm.serving import audit
from mu2llm.serving.audit import sha256_of
from mu2llm.serving.metrics import Metrics, counted
from mu2llm.serving.problems import Problem
from mu2llm.serving.schemas import CorrectionIn, CorrectionOut, DecisionIn, Draft, FindingOut
from mu2llm.serving.store import Store, StoredReport, now


class Drafts:
    """Of one ingress replica, whose steps on one draft are done one by one. Where several replicas write, the last
    step holds, and the audit log has all."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self.store, self.metrics = store, metrics
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def get(self, identity: str) -> Draft:
        """A 404 where there is none."""
        return _draft(await asyncio.to_thread(self.store.report, identity))

    async def correct(self, given: CorrectionIn, question: str, principal: str) -> CorrectionOut:
        """Stores an edited report as a preference over the generated one; 404, 409 or 422 where they don't belong.
        `question` is the model's own, for texts that are sent without one."""
        async with self._alone(given.id or ""):
            stored = await self._corrected(given, question)
            identity = _identity(stored, given.edited)
            pair = given.edited.split() != stored.text.split()
            if not pair and stored.edited is None:
                return CorrectionOut(id=identity, pair=False)
            if stored.decided:
                raise _decided(stored)
            await self._step(stored, "edited", given.edited, principal)
            if pair:
                kept = _correction(stored, given.edited, identity, principal)
                await asyncio.to_thread(self.store.save_correction, kept)
            if stored.id:
                await asyncio.to_thread(self.store.keep_input, stored.id)
                await self._save(stored, "edited", principal, edited=given.edited)
        counted(self.metrics.corrections, int(pair))
        return CorrectionOut(id=identity, pair=pair)

    async def decide(self, given: DecisionIn, principal: str) -> Draft:
        """Accepts or rejects a draft, once: 409 where the other was decided. One that is accepted as it was generated
        is kept beside the corrections, as such."""
        async with self._alone(given.id):
            stored = await asyncio.to_thread(self.store.report, given.id)
            if stored.state == given.decision:
                return _draft(stored)
            if stored.decided:
                raise _decided(stored)
            await self._step(stored, given.decision, stored.current, principal)
            if given.decision == "accepted" and stored.state == "generated":
                kept = _correction(stored, stored.text, _identity(stored, stored.text), principal, accepted=True)
                await asyncio.to_thread(self.store.save_correction, kept)
            saved = await self._save(stored, given.decision, principal)
            await asyncio.to_thread(self.store.let_input_go, stored.id)
            return _draft(saved)

    async def delete(self, identity: str, principal: str) -> None:
        """Deletes a draft with its corrections and the input that was kept of its scan; a 404 where there is none."""
        async with self._alone(identity):
            await asyncio.to_thread(self.store.delete_report, identity, principal)

    @contextlib.asynccontextmanager
    async def _alone(self, identity: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(identity, asyncio.Lock()) if identity else contextlib.nullcontext()
        async with lock:
            yield

    async def _corrected(self, given: CorrectionIn, question: str) -> StoredReport:
        """What was generated: by its id, or as it was sent."""
        if given.id:
            stored = await asyncio.to_thread(self.store.report, given.id)
            if given.generated and given.generated.split() != stored.text.split():
                raise Problem(409, "other_report", "the generated text is not that of this id; send one of the two")
            if given.scan_sha256 and given.scan_sha256 != stored.scan_sha256:
                raise Problem(409, "other_scan", "this report is of another scan; leave scan_sha256 out")
            return stored
        if not (given.generated and given.scan_sha256):
            raise Problem(422, "invalid", "give the report's id, or generated and scan_sha256")
        return StoredReport(
            id="",
            text=given.generated,
            question=given.question or question,
            scan_sha256=given.scan_sha256,
            volume=None,
            checkpoint="",
            spec_hash="",
            made=now(),
        )

    async def _step(self, stored: StoredReport, action: audit.Action, text: str, principal: str) -> None:
        entry = audit.Entry(
            principal=principal,
            action=action,
            about=stored.id,
            checkpoint=stored.checkpoint,
            scan_sha256=stored.scan_sha256,
            text_sha256=sha256_of(text),
        )
        await asyncio.to_thread(self.store.add_entry, entry)

    async def _save(self, stored: StoredReport, state: str, principal: str, **changes: str) -> StoredReport:
        values = {"state": state, "changed_by": principal, "changed": now(), **changes}
        saved = stored.model_copy(update=values)
        await asyncio.to_thread(self.store.replace_report, saved)
        return saved


def _identity(stored: StoredReport, text: str) -> str:
    return hashlib.sha256(f"{stored.id}\n{stored.scan_sha256}\n{text}".encode()).hexdigest()[:32]


def _correction(stored: StoredReport, chosen: str, identity: str, principal: str, accepted: bool = False) -> Correction:
    return Correction(
        id=identity,
        report_id=stored.id,
        scan_sha256=stored.scan_sha256,
        volume=stored.volume,
        question=stored.question,
        chosen=chosen,
        rejected=stored.text,
        checkpoint=stored.checkpoint,
        spec_hash=stored.spec_hash,
        input_key=stored.input_key,
        time=now().isoformat(timespec="seconds"),
        principal=principal,
        accepted=accepted,
    )


def _decided(stored: StoredReport) -> Problem:
    return Problem(409, "decided", f"this draft was {stored.state}, which stays so; make another report of the scan")


def _draft(stored: StoredReport) -> Draft:
    return Draft(
        id=stored.id,
        state=stored.state,
        report=stored.text,
        edited=stored.edited,
        question=stored.question,
        scan_sha256=stored.scan_sha256,
        made=stored.made.isoformat(timespec="milliseconds"),
        made_by=stored.made_by,
        changed=stored.changed and stored.changed.isoformat(timespec="milliseconds"),
        changed_by=stored.changed_by,
        findings=[FindingOut(**finding.model_dump()) for finding in findings(stored.text)],
        model=stored.model,
        scan=stored.scan,
    )

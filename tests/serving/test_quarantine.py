"""Scans over which readers crash, without Ray and without readers."""

import asyncio

import psutil
import pytest
from ray.exceptions import NodeDiedError, RayActorError
from test_parts import SCAN, known

from mu2llm.memory import machine_memory
from mu2llm.serving.jobs import Jobs
from mu2llm.serving.problems import Problem
from mu2llm.serving.quarantine import digest_of
from mu2llm.serving.reader import VolumeReader
from mu2llm.serving.refusal import Refusal
from mu2llm.serving.schemas import ReportOptions
from mu2llm.serving.service import Upload
from mu2llm.settings.serving import ServingConfig

EVIL, SOUND = b"evil", b"sound"


class FragileReader:
    """A reader's handle: over EVIL its replica dies, with all that it reads at the time; or, by `child`, its child."""

    def __init__(self, child=False, error=RayActorError):
        self.child, self.error, self.asked, self.now = child, error, [], []

    def __getattr__(self, method):
        return self

    def remote(self, reading):
        data = reading.source[0]
        self.asked.append(data)
        future = asyncio.get_running_loop().create_future()
        if data == EVIL and self.child:
            future.set_result(Refusal("crashed"))
            return future
        self.now.append(future)
        asyncio.get_running_loop().call_later(0.02, self._die if data == EVIL else self._end, future)
        return future

    def _die(self, _):
        for future in self.now:
            if not future.done():
                future.set_exception(self.error())
        self.now = []

    def _end(self, future):
        if not future.done():
            future.set_result(SCAN)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr("mu2llm.serving.calls.BACK_OFF_S", 0.001)


def read(service, data):
    return service.read(service.begin(Upload((data,)), ReportOptions()))


def code_of(service, data):
    try:
        asyncio.run(read(service, data))
    except Problem as problem:
        return problem.status, problem.code
    return 200, ""


@pytest.mark.parametrize("child", [False, True])
def test_a_scan_crashes_two_readers_and_no_more(tmp_path, child):
    """It killed eight, and as a job forty."""
    reader = FragileReader(child)
    service = known(tmp_path, None, reader)
    assert code_of(service, EVIL) == (422, "crashed") and len(reader.asked) == 2
    assert code_of(service, EVIL) == (422, "crashed") and len(reader.asked) == 2
    assert code_of(service, SOUND) == (200, "")
    after_a_restart = known(tmp_path, None, reader)
    asyncio.run(after_a_restart.reader.learn())
    assert code_of(after_a_restart, EVIL) == (422, "crashed") and reader.asked.count(EVIL) == 2


def test_a_job_of_such_a_scan_fails_after_two(tmp_path):
    reader = FragileReader()
    service = known(tmp_path, None, reader)
    jobs = Jobs(service)

    async def go():
        job = await jobs.add(Upload((EVIL,)), ReportOptions())
        await jobs._run(service.store.open_jobs()[0])
        return await jobs.get(job.id)

    job = asyncio.run(go())
    assert (job.status, job.problem["code"], len(reader.asked)) == ("failed", "crashed", 2)


def test_who_is_read_beside_such_a_scan_is_not_blamed(tmp_path):
    reader = FragileReader()
    service = known(tmp_path, None, reader)

    async def go():
        return await asyncio.gather(*[read(service, data) for data in (SOUND, EVIL, SOUND)], return_exceptions=True)

    first, evil, second = asyncio.run(go())
    assert first is second is SCAN and evil.code == "crashed"
    assert code_of(service, SOUND) == (200, "")


def test_nodes_that_die_are_no_scans_fault(tmp_path):
    reader = FragileReader(error=lambda: NodeDiedError("gone"))
    service = known(tmp_path, None, reader)
    assert code_of(service, EVIL) == (503, "lost") and len(reader.asked) == 8
    assert service.store.quarantined() == set()


def test_what_is_kept_out_is_forgotten_with_time(tmp_path):
    service = known(tmp_path, None, FragileReader(), ServingConfig(state=str(tmp_path), keep_reports_days=1e-9))
    assert code_of(service, EVIL) == (422, "crashed") and service.store.quarantined() == {digest_of([EVIL])}
    assert service.store.forget_old() == 1 and service.store.quarantined() == set()


def test_a_file_that_was_mended_is_another(tmp_path):
    path = tmp_path / "scan.nii"
    path.write_bytes(b"bad")
    bad = digest_of(f"file://{path}")
    path.write_bytes(b"mended")
    assert digest_of(f"file://{path}") != bad


def test_one_scan_may_take_no_more_than_the_machine_has(monkeypatch):
    """Four times 8 GiB were promised wherever it ran."""
    monkeypatch.setattr("mu2llm.serving.reader.machine_memory", lambda: 4 * 2**30)
    monkeypatch.setattr("mu2llm.serving.reader.Decoder.start", lambda _: None)
    small, large = (VolumeReader(ServingConfig(reading_gib=gib).model_dump()) for gib in (1, 8))
    assert small.decoders[0].memory == 2**30 and large.decoders[0].memory == int(0.8 * 4 * 2**30)
    assert 0 < machine_memory() <= psutil.virtual_memory().total

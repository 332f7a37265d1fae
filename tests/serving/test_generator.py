"""`ReportGenerator` by itself: batches, remembered scans, another checkpoint while it writes."""

import asyncio

import numpy as np
import pytest
import torch
from small_writer import FIRST, SECOND, experiment, write_checkpoint

from mu2llm.engine.decoder import ContinuousDecoder
from mu2llm.errors import Failure
from mu2llm.serving.decoder import Scan
from mu2llm.serving.exchange import ReportRequest, Written
from mu2llm.serving.generator import ReportGenerator
from mu2llm.serving.loaded import LoadedModel
from mu2llm.serving.refusal import Refusal
from mu2llm.settings.serving import ServingConfig

SPEC = experiment().data.spec


def scan(seed=0, spec=SPEC):
    voxels = np.random.default_rng(seed).integers(0, 256, spec.shape, dtype=np.uint8)
    return Scan({}, voxels, np.ones(spec.chunks, bool), np.eye(4), spec.hash, f"scan-{seed}", 0.0)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return write_checkpoint(str(tmp_path_factory.mktemp("generator") / "second"), SECOND)


def with_generator(checkpoint, tmp_path, use, alone=True, **settings):
    async def go():
        serving = ServingConfig(registry_seconds=0.2, **settings)
        generator = ReportGenerator(serving.model_dump(), f"sqlite:///{tmp_path}/tracking.db", alone)
        await generator.reconfigure({"checkpoint": checkpoint})
        return await use(generator)

    return asyncio.run(go())


def test_requests_that_wait_are_one_batch_and_a_scan_is_encoded_once(checkpoint, tmp_path):
    async def use(generator):
        requests = [ReportRequest(str(n), scan(n % 2)) for n in range(4)]
        return await asyncio.gather(*[generator.write(each) for each in requests]), await generator.write(requests[0])

    together, later = with_generator(checkpoint, tmp_path, use)
    assert [written.text for written in together] == [FIRST] * 4
    assert {written.batch for written in together} == {4}
    assert not any(written.cached for written in together) and later.cached


def test_streams_and_whole_reports_share_a_batch(checkpoint, tmp_path):
    async def use(generator):
        async def stream():
            return [part async for part in generator.stream(ReportRequest("a", scan(0)))]

        return await asyncio.gather(stream(), generator.write(ReportRequest("b", scan(1))))

    parts, whole = with_generator(checkpoint, tmp_path, use)
    assert "".join(parts[:-1]) == parts[-1].text == whole.text == FIRST
    assert parts[-1].batch == 2


@pytest.mark.parametrize("stop", [("effusion. The", "no such words"), (" left",), (FIRST[-8:],)])
def test_a_report_ends_before_its_stop_sequence(checkpoint, tmp_path, stop):
    """It was dropped without a word."""

    async def use(generator):
        async def stream():
            return [part async for part in generator.stream(ReportRequest("a", scan(0), stop=stop))]

        others = [generator.write(ReportRequest("b", scan(1), stop=stop)), generator.write(ReportRequest("c", scan(1)))]
        return await asyncio.gather(stream(), *others)

    parts, whole, plain = with_generator(checkpoint, tmp_path, use)
    assert "".join(parts[:-1]) == parts[-1].text == whole.text == FIRST[: FIRST.index(stop[0])]
    assert whole.finished and whole.tokens < plain.tokens and plain.text == FIRST


def test_who_comes_later_joins_those_that_are_being_written(checkpoint, tmp_path):
    """Batches were closed: the second waited for the first one's end."""

    async def use(generator):
        first = asyncio.create_task(generator.write(ReportRequest("a", scan(0))))
        stream = generator.stream(ReportRequest("b", scan(1), temperature=0.01, seed=3))
        pieces = [await anext(stream)]  # the batch is on its way
        late = await generator.write(ReportRequest("c", scan(2), max_new_tokens=3))
        pieces += [piece async for piece in stream]
        return await first, pieces, late

    first, pieces, late = with_generator(checkpoint, tmp_path, use)
    assert first.text == "".join(pieces[:-1]) == pieces[-1].text == FIRST
    assert late.batch == 3 and late.tokens == 3 and FIRST.startswith(late.text) and not late.finished


def test_who_leaves_makes_room(checkpoint, tmp_path):
    async def use(generator):
        left = generator.stream(ReportRequest("a", scan(0)))
        await anext(left)
        waits = asyncio.create_task(generator.write(ReportRequest("b", scan(1))))
        await left.aclose()
        return await waits, len(generator.waiting)

    written, waiting = with_generator(checkpoint, tmp_path, use, max_batch_size=1)
    assert (written.text, written.batch, waiting) == (FIRST, 1, 0)


def test_one_that_cannot_be_written_fails_alone(checkpoint, tmp_path, monkeypatch):
    """The others are written by themselves, and a client that was told a piece of its text is not told it again."""
    features = LoadedModel.features

    def broken(self, scans):
        if "scan-9" in scans:
            raise RuntimeError("no")
        return features(self, scans)

    monkeypatch.setattr(LoadedModel, "features", broken)

    async def use(generator):
        stream = generator.stream(ReportRequest("a", scan(0)))
        pieces = [await anext(stream)]
        bad = asyncio.create_task(generator.write(ReportRequest("b", scan(9))))
        pieces += [piece async for piece in stream]
        await generator.check_health()
        return pieces, await bad

    pieces, refusal = with_generator(checkpoint, tmp_path, use)
    assert refusal.reason == "broken" and refusal.message.startswith("RuntimeError < test_generator.py")
    assert "".join(pieces[:-1]) == pieces[-1].text == FIRST


def test_a_device_that_failed_ends_the_replica(checkpoint, tmp_path, monkeypatch):
    """It stayed healthy, and failed every report from then on."""

    def failed(*_):
        raise torch.AcceleratorError("an illegal memory access", 700)

    async def use(generator):
        monkeypatch.setattr(ContinuousDecoder, "step", failed)
        written = await generator.write(ReportRequest("a", scan(0)))
        with pytest.raises(RuntimeError, match="device"):
            await generator.check_health()
        return written, await generator.write(ReportRequest("b", scan(0))), await generator.status()

    written, later, status = with_generator(checkpoint, tmp_path, use)
    assert isinstance(written, Refusal) and written == later and written.reason == "not_ready"
    assert not status.ready and "device" in status.why


def test_another_checkpoint_takes_over_between_two_reports(checkpoint, second, tmp_path):
    async def use(generator):
        texts = []
        await generator.reconfigure({"checkpoint": second})
        while SECOND not in texts:
            several = [generator.write(ReportRequest(str(n), scan(n))) for n in range(3)]
            texts += [written.text for written in await asyncio.gather(*several)]
            assert len(texts) < 2000
        return texts

    texts = with_generator(checkpoint, tmp_path, use)
    assert texts[0] == FIRST and texts[-1] == SECOND and set(texts) == {FIRST, SECOND}


def test_a_checkpoint_that_cannot_be_loaded_stops_nothing(checkpoint, tmp_path):
    async def use(generator):
        await generator.reconfigure({"checkpoint": str(tmp_path / "nothing")})
        await asyncio.sleep(0.5)
        return await generator.write(ReportRequest("a", scan(0))), await generator.status()

    written, status = with_generator(checkpoint, tmp_path, use)
    assert written.text == FIRST and status.ready and status.warm_up_seconds > 0


def test_without_a_checkpoint_it_is_not_ready_until_there_is_one(checkpoint, tmp_path):
    late = tmp_path / "late"

    async def use(generator):
        before = await generator.status(), await generator.write(ReportRequest("a", scan(0)))
        late.symlink_to(checkpoint)
        while not (await generator.status()).ready:
            await asyncio.sleep(0.1)
        return *before, await generator.write(ReportRequest("a", scan(0)))

    status, refused, written = with_generator(str(late), tmp_path, use)
    assert not status.ready and "could not be loaded" in status.why and str(late) not in status.why
    assert isinstance(refused, Refusal) and refused.reason == "not_ready" and isinstance(written, Written)


def test_on_a_cluster_a_replica_without_a_checkpoint_never_starts(checkpoint, tmp_path):
    """It counted as healthy, and took the place of one that could write."""
    with pytest.raises(Failure, match=r"could not be loaded \(UserError\)"):
        with_generator(str(tmp_path / "none"), tmp_path, None, alone=False)

    async def use(generator):
        await generator.reconfigure({"checkpoint": str(tmp_path / "none")})
        await generator._swap
        return await generator.status(), await generator.check_health()

    status, _ = with_generator(checkpoint, tmp_path, use, alone=False)
    assert status.ready  # the one that it has goes on


def test_a_scan_of_another_spec_is_sent_back(checkpoint, tmp_path):
    other = SPEC.model_copy(update={"fit": "isotropic"})

    async def use(generator):
        return await generator.write(ReportRequest("a", scan(0, other)))

    assert with_generator(checkpoint, tmp_path, use) == Refusal("wrong_spec")


def test_a_registry_that_failed_once_is_asked_again(checkpoint, tmp_path, monkeypatch):
    """An error of the tracking server ended the task that follows the registry, unseen until a restart."""
    answers = iter([ConnectionAbortedError("a hiccup"), Exception("MLflow's own kind of error")])

    def locate(uri):
        error = next(answers, None)
        if error:
            raise error
        return checkpoint

    monkeypatch.setattr("mu2llm.tracking.locate", locate)

    async def use(generator):
        before = await generator.status()
        while not (await generator.status()).ready:
            await asyncio.sleep(0.1)
        return before.ready

    assert not with_generator("registry://mu2llm@champion", tmp_path, use)


def test_a_remembered_scan_keeps_itself_alone(checkpoint):
    """It kept the batch that it was encoded with: views of 64 KiB for 8."""
    loaded = LoadedModel(checkpoint, ServingConfig())
    kept = loaded.features({f"scan-{n}": scan(n) for n in range(4)})
    assert {row.untyped_storage().nbytes() for row in kept.values()} == {kept["scan-0"].nbytes}

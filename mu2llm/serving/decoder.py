"""The process that opens what clients send: its memory is limited, it can be killed, and it is sealed.

A `Decoder` holds one such process, so that a bomb or a decoder that hangs or crashes costs one request and no more; and
one without a seal that brings what a URI names onto the disk first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pydicom

from mu2llm import ct, storage
from mu2llm.ct import dicom_headers, sources
from mu2llm.errors import Rejection
from mu2llm.records import PreprocessSpec
from mu2llm.serving import fetcher
from mu2llm.serving.child import Child
from mu2llm.serving.fetcher import Fetch
from mu2llm.serving.refusal import Refusal, attempted

DECODES, FETCHES = "mu2llm.serving.decoder:answer", "mu2llm.serving.fetcher:answer"
_UIDS: list[Any] = ["SOPClassUID", "SOPInstanceUID"]


@dataclass(frozen=True)
class Reading:
    """What is to be read: files' bytes or an (allowed) URI or path, as many series as `spec` reads; `references` asks
    for the DICOM instances too."""

    source: list[bytes] | str
    spec: PreprocessSpec
    accept: tuple[str, ...] = ()
    references: bool = False


@dataclass(frozen=True)
class References:
    """Which DICOM instances a scan is made of: (series, SOP class, SOP instance) UIDs of one study; and the header of
    the first, as it was sent: whose scan it is."""

    study: str
    instances: tuple[tuple[str, str, str], ...]
    header: pydicom.Dataset = field(repr=False)


@dataclass(frozen=True)
class Scan:
    """A scan as the model takes it, and what may be told of it. `key` names its voxels as they were prepared."""

    facts: dict[str, Any]
    voxels: np.ndarray
    chunk_mask: np.ndarray
    affine: np.ndarray
    spec_hash: str
    key: str
    seconds: float
    references: References | None = None


def read(reading: Reading, max_slices: int) -> Scan:
    """Decodes and prepares. Raises Rejection."""
    started = time.monotonic()
    volumes = ct.read_several(reading.source, reading.spec.series, accept=reading.accept)
    slices = max(max(volume.hu.shape[2], min(volume.hu.shape)) for volume in volumes)
    if slices > max_slices:
        raise Rejection("", "too_large", f"{slices} slices; the service takes {max_slices}")
    prepared = ct.prepare(volumes, reading.spec)
    told = ct.describe(volumes[0]) | {"warnings": list(ct.warnings(volumes, reading.spec))}
    facts = {name: told[name] for name in ("sha256", "shape", "spacing", "orientation", "warnings")}
    voxels = np.ascontiguousarray(prepared.voxels)
    return Scan(
        facts={
            **facts,
            "format": volumes[0].format,
            "series": len(volumes),
            "series_uid_sha256": _digest_of_series(volumes[0]),
        },
        voxels=voxels,
        chunk_mask=prepared.chunk_mask,
        affine=prepared.affine,
        spec_hash=reading.spec.hash,
        key=ct.input_key(voxels, prepared.chunk_mask),
        seconds=time.monotonic() - started,
        references=_references(reading, volumes) if volumes[0].format == sources.DICOM else None,
    )


def _digest_of_series(volume: ct.CTVolume) -> str | None:
    """Who has the files finds the series by it, nobody else does; None where there is no UID, or one a slice."""
    joined = "series_joined" in volume.warnings
    return hashlib.sha256(volume.series.encode()).hexdigest() if volume.series and not joined else None


def _references(reading: Reading, volumes: list[ct.CTVolume]) -> References | None:
    """The instances of the series that were read (of all that were joined), by their headers, where they are asked
    for."""
    if not reading.references:
        return None
    joined = "series_joined" in volumes[0].warnings
    names = [volume.series for volume in volumes]
    slices, _ = dicom_headers.parse(_parts(reading.source), "")
    files = {id(each.part): each for each in slices if (joined or each.series in names) and each.rows}
    found: list[tuple[str, str, str]] = []
    header = None
    for each in files.values():
        tags = _UIDS if found else None  # None: all
        stream = io.BytesIO(each.part.load())
        told = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=tags, force=True)
        if "SOPClassUID" in told and "SOPInstanceUID" in told:
            header = header or told
            found.append((each.series, str(told.SOPClassUID), str(told.SOPInstanceUID)))
    if header is None:
        return None
    header.remove_private_tags()
    header.decode()
    return References(str(header.get("StudyInstanceUID", "")), tuple(found), pydicom.Dataset(header))


def _parts(source: list[bytes] | str) -> list[sources.Part]:
    """The files of a DICOM series: as they were sent, of a folder, or of a zip."""
    if isinstance(source, str):
        filesystem, found = sources.info(source)
        if found.type == pafs.FileType.Directory:
            return sources.folder_parts(filesystem, found.path, source)
        source = [storage.read_bytes(source)]
    if len(source) == 1 and sources.kind_of(source[0][:1024]) == sources.ZIP:
        return sources.zip_parts(source[0], "")
    return sources.byte_parts(source, "")


class Decoder:
    """Two child processes for one scan at a time, each started when it is first needed and anew after it was killed.

    What fetches has this process' environment and network, and decodes nothing; what decodes is sealed.
    """

    def __init__(self, seconds: float, memory: int, max_slices: int) -> None:
        self.seconds, self.memory, self.max_slices = seconds, memory, max_slices
        self._thread = ThreadPoolExecutor(1, "decoder")  # its own: nothing else waits while it reads
        self._children: dict[str, Child] = {}

    @property
    def warm(self) -> bool:
        """Whether the process that decodes is there."""
        return DECODES in self._children

    async def read(self, reading: Reading) -> Scan | Refusal:
        """The scan, or why there is none; within the time limit, whatever the file. Nothing is read any more for one
        who no longer waits."""
        gone = threading.Event()
        answer = asyncio.get_running_loop().run_in_executor(self._thread, self._read, reading, gone)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            gone.set()
            for child in list(self._children.values()):
                child.kill()
            await asyncio.wait([answer])
            raise

    def start(self) -> None:
        """Lets the process start and import meanwhile, so that the first scan need not wait for it."""
        self._thread.submit(self._running, DECODES)

    def _read(self, reading: Reading, gone: threading.Event) -> Scan | Refusal:
        deadline = time.monotonic() + self.seconds

        def ask(child: Child, request: Any) -> Any:
            if gone.is_set():  # before the process was there to be killed
                raise EOFError
            return child.ask((request, self.max_slices), deadline - time.monotonic())

        try:
            with contextlib.ExitStack() as held:
                if isinstance(reading.source, str) and fetcher.is_remote(reading.source):
                    folder = held.enter_context(tempfile.TemporaryDirectory(prefix="mu2llm-"))
                    fetched = ask(self._running(FETCHES), Fetch(reading.source, folder, reading.spec.series))
                    if isinstance(fetched, Refusal):
                        return fetched
                    reading = replace(reading, source=fetched)
                answer: Scan | Refusal = ask(self._running(DECODES), reading)
                return answer
        except TimeoutError:
            self._end()
            return Refusal("slow")
        except (EOFError, OSError):
            self._end()
            return Refusal("crashed")

    def _running(self, answers: str) -> Child:
        if answers not in self._children or not self._children[answers].alive:
            self._children[answers] = Child(answers, self.memory, sealed=answers == DECODES)
        return self._children[answers]

    def _end(self) -> None:
        while self._children:
            self._children.popitem()[1].end()

    def close(self) -> None:
        self._end()
        self._thread.shutdown(wait=False)


def answer(asked: tuple[Reading, int]) -> Scan | Refusal:
    """In the child: the scan, or why there is none."""
    return attempted(lambda: read(*asked))

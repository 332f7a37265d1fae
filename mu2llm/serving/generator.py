"""`ReportGenerator`: holds the checkpoint, writes reports together, follows the registry."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mu2llm import tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.engine.decoder import Line, Writing
from mu2llm.engine.sampling import Decoding, read_text
from mu2llm.errors import UserError
from mu2llm.model import load
from mu2llm.serving.batching import Row, Waiting
from mu2llm.serving.decoder import Scan
from mu2llm.serving.exchange import Asked, Status, Unable, Written
from mu2llm.serving.saliency import overlay, sentence_maps
from mu2llm.settings.serving import ServingConfig

logger = logging.getLogger("ray.serve")
REGISTRY = f"registry://{tracking.MODEL}@"
REGION = "Describe the findings in the {}."
WARM_UP_TOKENS = 8


class Loaded:
    """A checkpoint in memory, and the encodings of the scans that it saw last."""

    def __init__(self, uri: str, device: str, cached_scans: int) -> None:
        checkpoint = open_checkpoint(uri)
        self.uri, self.cached_scans = uri, cached_scans
        self.model, self.processor = load(uri)
        self.model.requires_grad_(False).to(device)  # type: ignore[arg-type]
        self.spec = self.processor.spec
        identity = checkpoint.lineage.identity or hashlib.sha256(uri.encode()).hexdigest()[:12]
        stage = checkpoint.lineage.stage
        name = uri.rstrip("/").rsplit("/", 1)[-1]
        self.facts = {"id": f"mu2llm-{stage}-{identity}", "stage": stage, "checkpoint": name}
        evaluation = checkpoint.experiment.get("evaluation", {})
        self.question = str(evaluation.get("question", "Write the radiology report of this CT scan."))
        self.max_new_tokens = int(evaluation.get("max_new_tokens", 256))
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    @torch.inference_mode()
    def features(self, scans: dict[str, Scan]) -> dict[str, Tensor]:
        """Key → (T, n, E), each scan encoded once as long as it is remembered."""
        new = {key: scan for key, scan in scans.items() if key not in self._features}
        if new:
            voxels, masks = (
                torch.from_numpy(np.stack([getattr(scan, name) for scan in new.values()])).to(self.model.device)
                for name in ("voxels", "chunk_mask")
            )
            self._features.update(zip(new, self.model.encode_vision(voxels, masks), strict=True))
        found = {key: self._features[key] for key in scans}
        for key in scans:
            self._features.move_to_end(key)
        while len(self._features) > self.cached_scans:
            self._features.popitem(last=False)
        return found

    def knows(self, key: str) -> bool:
        return key in self._features

    def warm_up(self) -> float:
        """A short report of an empty scan; the seconds it took."""
        started = time.monotonic()
        voxels = torch.zeros(1, *self.spec.shape, dtype=torch.uint8 if self.spec.dtype == "uint8" else torch.float32)
        mask = torch.ones(1, self.spec.chunks, dtype=torch.bool, device=self.model.device)
        with torch.inference_mode():
            features = self.model.encode_vision(voxels.to(self.model.device), mask)
        writing = Writing(self.model, self.processor)
        writing.join(features, mask, [Line(self.question, "warm-up", Decoding(WARM_UP_TOKENS))])
        for _ in range(WARM_UP_TOKENS - 1):
            writing.step()
        return time.monotonic() - started


class ReportGenerator:
    """Scans and questions → reports. Its `user_config` is `{"checkpoint": URI or registry://mu2llm@ALIAS}`.

    Reports are written together, up to `max_batch_size` at a time: who comes joins those that are being written, and
    who is done or has left makes room. The first checkpoint is loaded before the replica counts as running; another
    one is loaded beside it, and takes over when what the old one has begun is written: nothing is dropped. Without
    `tracking_store` the registry is the one that MLFLOW_TRACKING_URI names where the replica runs.
    """

    def __init__(self, settings: dict[str, Any], tracking_store: str | None) -> None:
        if tracking_store:
            os.environ["MLFLOW_TRACKING_URI"] = tracking_store
        self.settings = ServingConfig.model_validate(settings)
        torch.set_num_threads(max(1, int(self.settings.generator.cpus)))
        self.device = "cuda" if self.settings.generator.gpus else "cpu"
        self.source, self.why = "", "no checkpoint was loaded yet"
        self.loaded: Loaded | None = None
        self.failed = False  # to load what is asked for
        self.warm_up_seconds: float | None = None
        self.waiting: Waiting[Asked] = Waiting()
        self.broken = False  # its device: only a new process can write again
        self._writer: asyncio.Task[None] | None = None
        self._loading = asyncio.Lock()
        self._follower: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls it with the first user_config and with each new one."""
        first = not self.source
        self.source = str(user_config["checkpoint"])
        if first:
            await self._load()
            self._follower = asyncio.create_task(self._follow())
        else:
            self._swap = asyncio.create_task(self._load())

    async def _follow(self) -> None:
        """Looks the model up in the registry from time to time; tries again what could not be loaded."""
        while True:
            await asyncio.sleep(self.settings.registry_seconds)
            if self.source.startswith(REGISTRY) or self.loaded is None or self.failed:
                await self._load()

    async def _load(self) -> None:
        async with self._loading:
            try:
                uri = await asyncio.to_thread(tracking.locate, self.source)
                if self.loaded is not None and self.loaded.uri == uri:
                    self.failed = False
                    return
                new = await asyncio.to_thread(Loaded, uri, self.device, self.settings.cached_scans)
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
        if loaded is None or self.broken:
            return Status(False, self.why)
        return Status(True, "", loaded.facts, loaded.spec, loaded.question, len(self.waiting), self.warm_up_seconds)

    async def write(self, asked: Asked) -> Written | Unable:
        """The whole report."""
        row = self._admit(asked)
        if isinstance(row, Unable):
            return row
        try:
            result: Written | Unable = await row.done
            return result
        finally:
            self.waiting.leave(row)

    async def stream(self, asked: Asked) -> AsyncIterator[str | Written | Unable]:
        """Pieces of the text as they are written, then the whole report."""
        row = self._admit(asked, streamed=True)
        if isinstance(row, Unable):
            yield row
            return
        try:
            async for piece in row.pieces():
                yield piece
            yield await row.done
        finally:
            self.waiting.leave(row)

    def _admit(self, asked: Asked, streamed: bool = False) -> Row[Asked] | Unable:
        loaded = self.loaded
        if loaded is None or self.broken:
            return Unable("not_ready", self.why)
        if asked.scan.spec_hash != loaded.spec.hash:
            return Unable("wrong_spec")
        try:
            prompt, _ = loaded.processor.token_ids(_question(asked, loaded))
        except UserError as error:
            return Unable("too_long", str(error))
        room = loaded.processor.max_text_tokens - (len(prompt) - loaded.processor.queries)
        length = min(asked.max_new_tokens or loaded.max_new_tokens, room)
        if length < 1:
            return Unable("too_long", "the question leaves no room for an answer")
        decoding = Decoding(length, 1, asked.temperature, asked.top_p, asked.seed)
        if self._writer is None:
            self._writer = asyncio.create_task(self._work())
        return self.waiting.add(Row(asked, decoding, streamed))

    async def _work(self) -> None:
        while True:
            await self.waiting.arrival()
            await asyncio.to_thread(self._write)

    def _write(self) -> None:
        """Writes what waits, in a thread, until nobody waits."""
        while len(self.waiting):
            assert self.loaded is not None
            group = _Group(self.loaded)
            try:
                self._together(group)
            except Exception as error:
                self._alone(group.taken, error)

    def _together(self, group: _Group) -> None:
        """Until the group is empty; others join it, as long as it is of the checkpoint that is to write."""
        while True:
            if self.loaded is group.loaded and group.open:
                group.join(self.waiting.take(self.settings.max_batch_size - len(group)))
            if not len(group):
                return
            group.step()

    def _alone(self, rows: list[Row[Asked]], error: Exception) -> None:
        """One that cannot be written fails alone; what is over is not written again."""
        logger.warning("writing %d reports together failed (%s); each by itself now", len(rows), type(error).__name__)
        for row in [row for row in rows if not row.answered and not row.left]:
            assert self.loaded is not None
            group = _Group(self.loaded)
            try:
                group.join([row])
                while len(group):
                    group.step()
            except Exception as failed:
                if isinstance(failed, torch.AcceleratorError):
                    self.broken, self.why = True, "its device failed, and another replica takes over"
                row.finish(Unable("not_ready", self.why) if self.broken else failed)


class _Group:
    """Rows that are written together: tells them of their text, lets go of those that are over."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.writing = Writing(loaded.model, loaded.processor)
        self.taken: list[Row[Asked]] = []
        self._rows: dict[Line, _Place] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def open(self) -> bool:
        return self.writing.open

    def join(self, rows: list[Row[Asked]]) -> None:
        """Encodes the rows' scans and writes their first tokens; who comes from another preprocessing is sent back."""
        self.taken = [row for row in self.taken if not row.answered] + rows
        started = time.monotonic()
        for row in [row for row in rows if row.asked.scan.spec_hash != self.loaded.spec.hash]:
            row.finish(Unable("wrong_spec"))  # the model was swapped while it waited
        rows = [row for row in rows if not row.answered]
        if not rows:
            return
        cached = [self.loaded.knows(row.asked.scan.key) for row in rows]
        features = self.loaded.features({row.asked.scan.key: row.asked.scan for row in rows})
        encoded = time.monotonic()
        lines = [Line(_question(row.asked, self.loaded), row.asked.scan.key, row.decoding) for row in rows]
        given = [features[row.asked.scan.key] for row in rows]
        for row, line, known, each in zip(rows, lines, cached, given, strict=True):
            self._rows[line] = _Place(row, each, known, started, encoded)
        for place in self._rows.values():
            place.together = max(place.together, len(self._rows))
        self.writing.join(torch.stack(given), _mask(rows, self.loaded), lines)
        self._follow(lines)

    def step(self) -> None:
        self.writing.step()
        self._follow(self.writing.lines)

    def _follow(self, lines: list[Line]) -> None:
        """What follows from a further token of each line."""
        gone = set()
        for line in lines:
            row = self._rows[line].row
            over = line.ids[-1] == self.loaded.processor.tokenizer.eos_token_id
            if row.streamed and not row.left:
                self._tell(row, line)
            if row.left or over or len(line.ids) == line.decoding.max_new_tokens:
                gone.add(line)
        for line in gone:
            place = self._rows.pop(line)
            if not place.row.left:
                self._finish(place, line)
        self.writing.leave(gone)

    def _tell(self, row: Row[Asked], line: Line) -> None:
        text = read_text(line.ids, self.loaded.processor).text
        # a character of several bytes may not be whole yet; what was told before a failure is not told again
        if not text.endswith("\ufffd") and text.startswith(row.told) and text != row.told:
            row.tell(text[len(row.told) :])

    def _finish(self, place: _Place, line: Line) -> None:
        """The answer of a row, where it is asked for with where each sentence comes from."""
        loaded, row, written = self.loaded, place.row, time.monotonic()
        text = read_text(line.ids, loaded.processor)
        maps = self._maps(row, text.text, place.features) if row.asked.saliency else None
        seconds = {
            "queue": place.started - row.arrived,
            "encode": place.encoded - place.started,
            "write": written - place.encoded,
            "saliency": time.monotonic() - written,
        }
        row.finish(
            Written(
                text=text.text,
                question=line.question,
                tokens=text.tokens,
                finished=text.finished,
                model=loaded.facts,
                spec={"name": loaded.spec.name, "hash": loaded.spec.hash},
                batch=place.together,
                cached=place.cached,
                seconds=seconds,
                checkpoint=loaded.uri,
                sentences=maps,
            )
        )

    def _maps(self, row: Row[Asked], report: str, features: Tensor) -> list[dict[str, Any]]:
        loaded = self.loaded
        found = sentence_maps(
            loaded.model,
            loaded.processor,
            features[None].clone(),  # made under inference mode, which gradients cannot pass
            _mask([row], loaded),
            _question(row.asked, loaded),
            report,
        )
        patch_size = tuple(loaded.model.config.vision.patch_size)
        return [
            {
                **vars(span),
                "nifti": base64.b64encode(overlay(weights, row.asked.scan.affine, patch_size)).decode(),
            }
            for span, weights in found
        ]


@dataclass
class _Place:
    """A row in a group; `together` is the most rows that it was written with, itself among them."""

    row: Row[Asked]
    features: Tensor
    cached: bool
    started: float
    encoded: float
    together: int = 0


def _mask(rows: list[Row[Asked]], loaded: Loaded) -> Tensor:
    return torch.from_numpy(np.stack([row.asked.scan.chunk_mask for row in rows])).to(loaded.model.device)


def _question(asked: Asked, loaded: Loaded) -> str:
    if asked.question:
        return asked.question
    return REGION.format(asked.region) if asked.region else loaded.question

"""`ReportGenerator`: holds the checkpoint, writes reports in batches, follows the registry."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mu2llm import tracking
from mu2llm.config import ServingConfig
from mu2llm.errors import UserError
from mu2llm.evaluation.decoding import Decoding, Text, read_text, write
from mu2llm.model import load
from mu2llm.records import Checkpoint
from mu2llm.serving.batching import Batcher, Row
from mu2llm.serving.decoder import Scan
from mu2llm.serving.exchange import Asked, Status, Unable, Written
from mu2llm.serving.saliency import overlay, sentence_maps

logger = logging.getLogger("ray.serve")
REGISTRY = f"registry://{tracking.MODEL}@"
REGION = "Describe the findings in the {}."
WARM_UP_TOKENS = 8


class Loaded:
    """A checkpoint in memory, and the encodings of the scans that it saw last."""

    def __init__(self, uri: str, device: str, cached_scans: int) -> None:
        checkpoint = Checkpoint.open(uri)
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
        mask = torch.ones(1, self.spec.chunks, dtype=torch.bool)
        with torch.inference_mode():
            features = self.model.encode_vision(voxels.to(self.model.device), mask.to(self.model.device))
        write(
            self.model,
            self.processor,
            features,
            mask.to(self.model.device),
            [self.question],
            ["warm-up"],
            Decoding(WARM_UP_TOKENS),
        )
        return time.monotonic() - started


class ReportGenerator:
    """Scans and questions → reports. Its `user_config` is `{"checkpoint": URI or registry://mu2llm@ALIAS}`.

    The first checkpoint is loaded before the replica counts as running; another one is loaded beside it, and takes
    over between two batches, so that nothing is dropped. Without `tracking_store` the registry is the one that
    MLFLOW_TRACKING_URI names where the replica runs.
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
        self.batcher: Batcher[Asked] = Batcher(self._run, self.settings.max_batch_size, self.settings.batch_wait_s)
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
        if self.batcher.broken:
            raise RuntimeError("the writing loop has ended")

    async def status(self) -> Status:
        loaded = self.loaded
        if loaded is None:
            return Status(False, self.why)
        waiting = len(self.batcher.waiting)
        return Status(True, "", loaded.facts, loaded.spec, loaded.question, waiting, self.warm_up_seconds)

    async def write(self, asked: Asked) -> Written | Unable:
        """The whole report."""
        row = self._admit(asked)
        if isinstance(row, Unable):
            return row
        try:
            result: Written | Unable = await row.done
            return result
        finally:
            self.batcher.leave(row)

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
            self.batcher.leave(row)

    def _admit(self, asked: Asked, streamed: bool = False) -> Row[Asked] | Unable:
        loaded = self.loaded
        if loaded is None:
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
        return self.batcher.add(Row(asked, decoding, streamed))

    def _run(self, rows: list[Row[Asked]]) -> None:
        """Writes one batch, in the batcher's thread."""
        loaded, started = self.loaded, time.monotonic()
        assert loaded is not None
        for row in [row for row in rows if row.asked.scan.spec_hash != loaded.spec.hash]:
            row.finish(Unable("wrong_spec"))  # the model was swapped while it waited
            rows.remove(row)
        if not rows:
            return
        cached = [loaded.knows(row.asked.scan.key) for row in rows]
        features = loaded.features({row.asked.scan.key: row.asked.scan for row in rows})
        batch = _Batch(loaded, rows, cached, started)
        texts = write(
            loaded.model,
            loaded.processor,
            torch.stack([features[row.asked.scan.key] for row in rows]),
            _mask(rows, loaded),
            [_question(row.asked, loaded) for row in rows],
            [row.asked.scan.key for row in rows],
            rows[0].decoding,
            batch,
        )
        for row, text in zip(rows, texts, strict=True):
            batch.finish(row, text[0], features[row.asked.scan.key])


class _Batch:
    """Follows a batch while it is written: tells the rows of their text, lets go of those that came to their end."""

    def __init__(self, loaded: Loaded, rows: list[Row[Asked]], cached: list[bool], started: float) -> None:
        self.loaded, self.rows, self.cached, self.started = loaded, rows, cached, started
        self.encoded = time.monotonic()
        self.end = loaded.processor.tokenizer.eos_token_id
        self.ids: list[list[int]] = [[] for _ in rows]
        self.over: set[int] = set()

    def step(self, tokens: list[int]) -> None:
        for index, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if index in self.over:
                continue
            self.ids[index].append(token)
            if row.streamed:
                self._tell(index)
            if token == self.end:
                self.over.add(index)
                if not row.asked.saliency:
                    self.finish(row, read_text(self.ids[index], self.loaded.processor))

    def stopped(self) -> list[bool]:
        return [row.left for row in self.rows]

    def _tell(self, index: int) -> None:
        text = read_text(self.ids[index], self.loaded.processor).text
        # a character of several bytes may not be whole yet
        told = self.rows[index].told  # also by an earlier batch that failed
        if not text.endswith("\ufffd") and text.startswith(told) and text != told:
            self.rows[index].tell(text[len(told) :])

    def finish(self, row: Row[Asked], text: Text, features: Tensor | None = None) -> None:
        """The answer of a row; with `features`, and where it is asked for, where each sentence comes from."""
        written = time.monotonic()
        maps = None
        if row.asked.saliency and features is not None and not row.left:
            maps = self._maps(row, text.text, features)
        seconds = {
            "queue": self.started - row.arrived,
            "encode": self.encoded - self.started,
            "write": written - self.encoded,
            "saliency": time.monotonic() - written,
        }
        loaded = self.loaded
        row.finish(
            Written(
                text=text.text,
                question=_question(row.asked, loaded),
                tokens=text.tokens,
                finished=text.finished,
                model=loaded.facts,
                spec={"name": loaded.spec.name, "hash": loaded.spec.hash},
                batch=len(self.rows),
                cached=self.cached[self.rows.index(row)],
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


def _mask(rows: list[Row[Asked]], loaded: Loaded) -> Tensor:
    return torch.from_numpy(np.stack([row.asked.scan.chunk_mask for row in rows])).to(loaded.model.device)


def _question(asked: Asked, loaded: Loaded) -> str:
    if asked.question:
        return asked.question
    return REGION.format(asked.region) if asked.region else loaded.question

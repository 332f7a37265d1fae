"""`LoadedModel`: a checkpoint in a replica's memory, with what the service tells of it."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mu2llm.artefacts import model_id, open_checkpoint, weights_of
from mu2llm.engine.decoder import ContinuousDecoder, Prompt, write
from mu2llm.engine.features import scan_features
from mu2llm.engine.loading import load, numerics
from mu2llm.engine.remote import Endpoint, RemoteDecoder
from mu2llm.engine.sampling import Decoding
from mu2llm.errors import UserError
from mu2llm.model.familiarity import Familiarity, pooled
from mu2llm.serving.decoder import Scan
from mu2llm.serving.exchange import ReportRequest
from mu2llm.settings.serving import ServingConfig, VllmConfig

logger = logging.getLogger("ray.serve")
REGION = "Describe the findings in the {}."
WARM_UP_TOKENS = 8


class LoadedModel:
    """A checkpoint in memory, and the encodings of the scans that it saw last."""

    def __init__(self, uri: str, settings: ServingConfig) -> None:
        checkpoint, inference = open_checkpoint(uri), settings.inference
        self.uri, self.cached_scans, self.precision = uri, settings.cached_scans, inference.used_precision
        self.model, self.processor = load(uri, self.precision, inference.used_device)
        self.spec = self.processor.spec
        self.weights = weights_of(checkpoint).weights
        stage = checkpoint.lineage.stage
        name = uri.rstrip("/").rsplit("/", 1)[-1]
        self.facts = {"id": model_id(checkpoint), "stage": stage, "checkpoint": name}
        evaluation = checkpoint.experiment.get("evaluation", {})
        self._question = str(evaluation.get("question", "Write the radiology report of this CT scan."))
        self.batch_size = settings.max_batch_size
        self.max_new_tokens = int(evaluation.get("max_new_tokens", 256))
        self.familiarity = Familiarity.read(uri)
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self.endpoint = endpoint_of(settings.vllm, self.facts["id"]) if settings.engine == "vllm" else None
        if self.endpoint:
            self.endpoint.check()

    def is_of(self, uri: str) -> bool:
        """Whether these are the weights that lie at the URI now."""
        return uri == self.uri and weights_of(open_checkpoint(uri)).weights == self.weights

    def question(self, request: ReportRequest | None = None) -> str:
        """What is asked: the request's own question, that about its region, or the one of the training."""
        if request and request.question:
            return request.question
        return REGION.format(request.region) if request and request.region else self._question

    def decoding(self, request: ReportRequest) -> Decoding | None:
        """How a request's text is drawn; None where its question leaves no room for an answer. Raises UserError where
        the question alone is too long."""
        room = self.processor.max_text_tokens - (self.prompt_tokens(request) - self.processor.queries)
        length = min(request.max_new_tokens or self.max_new_tokens, room)
        return Decoding(length, 1, request.temperature, request.top_p, request.seed) if length > 0 else None

    def prompt_tokens(self, request: ReportRequest) -> int:
        """How long the prompt is, visual tokens among it. Raises UserError where the question alone is too long."""
        return len(self.processor.token_ids(self.question(request))[0])

    def decoder(self) -> ContinuousDecoder:
        """What writes: here, or where vLLM does."""
        own = (self.model, self.processor, self.precision)
        return RemoteDecoder(*own, self.endpoint) if self.endpoint else ContinuousDecoder(*own)

    def features(self, scans: dict[str, Scan]) -> dict[str, Tensor]:
        """Key → (T, n, E), each scan encoded once as long as it is remembered."""
        new = {key: scan for key, scan in scans.items() if key not in self._features}
        if new:
            rows = {name: np.stack([getattr(scan, name) for scan in new.values()]) for name in ("voxels", "chunk_mask")}
            encoded = scan_features(self.model, rows, self.precision)[0]
            # a copy each: a view would keep the whole batch, however long one of it is remembered
            self._features.update((key, row.clone()) for key, row in zip(new, encoded, strict=True))
        found = {key: self._features[key] for key in scans}
        for key in scans:
            self._features.move_to_end(key)
        while len(self._features) > self.cached_scans:
            self._features.popitem(last=False)
        return found

    def knows(self, key: str) -> bool:
        """Whether a scan's encoding is remembered."""
        return key in self._features

    def percentile(self, features: Tensor, scan: Scan) -> float | None:
        """How unlike the training scans a scan with these features (T, n, E) is; None where nothing is kept of them."""
        known = self.familiarity
        return known.percentiles(pooled(features[None], self.chunk_mask([scan])))[0] if known else None

    def finding_probabilities(self, features: Tensor, scan: Scan) -> dict[str, float] | None:
        """How likely each finding is by the diagnostic prior, of a scan with these features (T, n, E); None without."""
        with numerics(self.model.device, self.precision):
            found = self.model.finding_probabilities(features[None], self.chunk_mask([scan]))
        return found[0] if found else None

    def chunk_mask(self, scans: Sequence[Scan]) -> Tensor:
        """(R, T)"""
        return torch.from_numpy(np.stack([scan.chunk_mask for scan in scans])).to(self.model.device)

    def warm_up(self) -> float:
        """A short report of an empty scan; the seconds it took. Where vLLM writes, says whether it writes what the
        checkpoint's own language model does."""
        started = time.monotonic()
        voxels = np.zeros((1, *self.spec.shape), dtype=self.spec.dtype)
        empty = {"voxels": voxels, "chunk_mask": np.ones((1, self.spec.shape[0]), dtype=bool)}
        prompt = Prompt(self.question(), "warm-up", Decoding(WARM_UP_TOKENS))
        scan = scan_features(self.model, empty, self.precision)
        written = write(self.decoder(), *scan, [prompt])
        seconds = time.monotonic() - started
        if self.endpoint and written != write(
            ContinuousDecoder(self.model, self.processor, self.precision), *scan, [prompt]
        ):
            logger.warning(
                "of an empty scan the server of serving.vllm writes other tokens than %s itself: by another rounding, "
                "or it serves another language model (mu2llm export lm)",
                self.facts["id"],
            )
        return seconds


def endpoint_of(settings: VllmConfig, identity: str) -> Endpoint:
    """Where the language model of the checkpoint with this id is served. Raises UserError where the key is missing."""
    name = settings.key_variable
    if name and not os.environ.get(name):
        raise UserError(f"serving.vllm.key_variable={name}: the nodes' environment has no such variable; set it")
    return Endpoint(settings.url, settings.model or identity, os.environ[name] if name else "", settings.silent_seconds)

"""`RunningBatch`: the requests that a replica writes together, and what follows from each of their tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from mu2llm.engine.decoder import Prompt, TokenSequence
from mu2llm.engine.remote import EndpointFault
from mu2llm.serving.exchange import ReportRequest, Written
from mu2llm.serving.loaded import LoadedModel
from mu2llm.serving.queue import QueuedRequest
from mu2llm.serving.refusal import Refusal
from mu2llm.serving.stop import before_stop, without_begun_stop

_ENDPOINT = {True: "engine_down", False: "engine_refused"}
Queued = QueuedRequest[ReportRequest]


@dataclass
class Slot:
    """A request in the batch; `together` is the most requests that it was written with, itself among them."""

    queued: Queued
    features: Tensor
    cached: bool
    started: float
    encoded: float
    together: int = 0


class RunningBatch:
    """Sends requests their text as it is written, and lets go of those that are over."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.decoder = loaded.decoder()
        self.taken: list[Queued] = []  # those without an answer yet, in a slot or on the way into one
        self._slots: dict[TokenSequence, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def open(self) -> bool:
        return self.decoder.open

    def join(self, requests: list[Queued]) -> None:
        """Encodes their scans and writes their first tokens; what comes from another preprocessing is sent back."""
        self.taken = [queued for queued in self.taken if not queued.answered] + requests
        started = time.monotonic()
        for queued in requests:
            if queued.request.scan.spec_hash != self.loaded.spec.hash:
                queued.finish(Refusal("wrong_spec"))  # the model was swapped while it waited
        requests = [queued for queued in requests if not queued.answered]
        if not requests:
            return
        scans = [queued.request.scan for queued in requests]
        cached = [self.loaded.knows(scan.key) for scan in scans]
        known = self.loaded.features({scan.key: scan for scan in scans})
        features = [known[scan.key] for scan in scans]
        encoded = time.monotonic()
        prompts = [
            Prompt(self.loaded.question(queued.request), queued.request.scan.key, queued.decoding)
            for queued in requests
        ]
        sequences = self.decoder.join(torch.stack(features), self.loaded.chunk_mask(scans), prompts)
        for sequence, queued, each, hit in zip(sequences, requests, features, cached, strict=True):
            self._slots[sequence] = Slot(queued, each, hit, started, encoded)
        for slot in self._slots.values():
            slot.together = max(slot.together, len(self._slots))
        self._follow(sequences)

    def step(self) -> None:
        """A further token of each."""
        self.decoder.step()
        self._follow(self.decoder.sequences)

    def _follow(self, sequences: list[TokenSequence]) -> None:
        """What follows from a further token of each sequence."""
        gone = {each for each in sequences if self._is_over(each, self._slots[each].queued)}
        for sequence in gone:
            slot = self._slots.pop(sequence)
            if slot.queued.abandoned:
                continue
            if isinstance(sequence.fault, EndpointFault):
                slot.queued.finish(Refusal(_ENDPOINT[sequence.fault.passing], sequence.fault.why))
            else:
                self._finish(slot, sequence)
        self.decoder.leave(gone)

    def _is_over(self, sequence: TokenSequence, queued: Queued) -> bool:
        """Whether nothing more of a sequence is wanted; what is new of its text is sent where it is streamed."""
        if queued.abandoned or sequence.fault or not (queued.streamed or queued.request.stop):
            return queued.abandoned or sequence.over
        text, stopped = before_stop(self.decoder.text(sequence).text, queued.request.stop)
        over = sequence.over or stopped
        if queued.streamed:
            self._send(queued, text if over else without_begun_stop(text, queued.request.stop))
        return over

    def _send(self, queued: Queued, text: str) -> None:
        # a character of several bytes may not be whole yet; what was sent before a failure is not sent again
        if not text.endswith("\ufffd") and text.startswith(queued.sent) and text != queued.sent:
            queued.send(text[len(queued.sent) :])

    def _finish(self, slot: Slot, sequence: TokenSequence) -> None:
        """The answer to a request."""
        loaded, queued, written = self.loaded, slot.queued, time.monotonic()
        text = self.decoder.text(sequence)
        report, stopped = before_stop(text.text, queued.request.stop)
        seconds = {
            "queue": slot.started - queued.arrived,
            "encode": slot.encoded - slot.started,
            "write": written - slot.encoded,
        }
        queued.finish(
            Written(
                text=report,
                question=loaded.question(queued.request),
                tokens=text.tokens,
                finished=text.finished or stopped,
                model=loaded.facts,
                spec={"name": loaded.spec.name, "hash": loaded.spec.hash},
                batch=slot.together,
                cached=slot.cached,
                seconds=seconds,
                checkpoint=loaded.uri,
                percentile=loaded.percentile(slot.features, queued.request.scan),
                finding_probabilities=loaded.finding_probabilities(slot.features, queued.request.scan),
                prompt_tokens=loaded.prompt_tokens(queued.request),
            )
        )

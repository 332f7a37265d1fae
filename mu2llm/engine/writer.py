"""What the actors of `generate` do: scans with their questions → predictions."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mu2llm import logs
from mu2llm.artefacts import open_checkpoint, weights_of
from mu2llm.engine.actors import use_cpus
from mu2llm.engine.decoder import ContinuousDecoder, Prompt, Text, write
from mu2llm.engine.features import scan_features
from mu2llm.engine.loading import load, numerics
from mu2llm.engine.predictions import Prediction, Request, Variant


@dataclass(frozen=True)
class _Task:
    """One text to write: for the batch's case number `case`, from its scan number `scan` (None: an empty one)."""

    case: int
    scan: int | None
    variant: Variant
    question: str
    region: str | None = None


class Writer:
    """Holds the checkpoints in a Ray Data actor and writes what is requested of a batch."""

    def __init__(self, request: Request, patients: dict[str, str]) -> None:
        settings = request.inference
        logs.begin(stage="generate", checkpoints=",".join(request.checkpoints.values()))
        use_cpus(settings)
        self.request, self.patients, self.precision = request, patients, settings.used_precision
        self.decoders: dict[str, ContinuousDecoder] = {}
        self.visions: dict[str, str] = {}
        for run, uri in request.checkpoints.items():
            model, processor = load(uri, self.precision, settings.used_device)
            self.decoders[run] = ContinuousDecoder(model, processor, self.precision)
            self.visions[run] = weights_of(open_checkpoint(uri)).vision
        self.of_nothing: dict[Hashable, list[Text]] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Rows of `CaseReader` → a table of predictions, with the first place of their run."""
        tasks = list(self._tasks(batch))
        encoded: dict[str, Tensor] = {}
        predictions: list[Prediction] = []
        for run, decoder in self.decoders.items():
            if self.visions[run] not in encoded:
                encoded[self.visions[run]] = _encode(decoder, batch)
            texts = self._write(run, tasks, batch, encoded[self.visions[run]])
            for task, samples in zip(tasks, texts, strict=True):
                predictions += self._predictions(run, task, samples, batch)
        table = Prediction.table(predictions)
        return table.append_column("first", pa.array([int(batch["first"][0])] * len(table), pa.int64()))

    def _tasks(self, batch: dict[str, np.ndarray]) -> Iterator[_Task]:
        patients = [self.patients[case] for case in batch["id"]]
        for i in range(len(patients) - 1):
            scans: dict[Variant, int | None] = {"as_is": i, "shuffled": i + 1, "zeroed": None}
            for variant in self.request.variants:
                if variant != "shuffled" or patients[i] != patients[i + 1]:
                    yield _Task(i, scans[variant], variant, self.request.question)
            if self.request.regions:
                for asked in json.loads(batch["questions"][i] or "[]"):
                    if asked.get("region"):
                        yield _Task(i, i, "as_is", asked["question"], asked["region"])

    def _write(self, run: str, tasks: list[_Task], batch: dict[str, np.ndarray], features: Tensor) -> list[list[Text]]:
        """The texts of each task; what is greedily written of an empty scan is written once."""
        mask = torch.from_numpy(np.array(batch["chunk_mask"]))
        keys = [self._key(run, task, batch) for task in tasks]
        texts = dict(self.of_nothing)
        new = {key: task for key, task in zip(keys, tasks, strict=True) if key not in texts}
        decoder, decoding = self.decoders[run], self.request.decoding
        scans = [len(features) - 1 if task.scan is None else task.scan for task in new.values()]
        masks = mask[[task.case if task.scan is None else task.scan for task in new.values()]].to(features.device)
        prompts = [Prompt(task.question, str(batch["id"][task.case]), decoding) for task in new.values()]
        features = features[scans] * masks[..., None, None]
        written = write(decoder, features, masks, prompts, self.request.inference.max_sequences)
        texts.update(zip(new, written, strict=True))
        self.of_nothing |= {key: texts[key] for key, task in new.items() if task.scan is None}
        return [texts[key] for key in keys]

    def _key(self, run: str, task: _Task, batch: dict[str, np.ndarray]) -> Hashable:
        if task.scan is None and not self.request.decoding.temperature:
            return run, task.question, batch["chunk_mask"][task.case].tobytes()
        return run, str(batch["id"][task.case]), task

    def _predictions(
        self, run: str, task: _Task, samples: list[Text], batch: dict[str, np.ndarray]
    ) -> list[Prediction]:
        return [
            Prediction(
                run=run,
                case_id=str(batch["id"][task.case]),
                variant=task.variant,
                region=task.region,
                question=task.question,
                index=index,
                text=sample.text,
                tokens=sample.tokens,
                finished=sample.finished,
                scan_of="" if task.scan is None else str(batch["id"][task.scan]),
                seed=self.request.decoding.seed,
            )
            for index, sample in enumerate(samples)
        ]


def _encode(decoder: ContinuousDecoder, batch: dict[str, np.ndarray]) -> Tensor:
    """(scans + 1, T, n, E): features of the batch's scans, and last those of an empty one."""
    model, vision = decoder.model, decoder.model.config.vision
    features, mask = scan_features(model, batch, decoder.precision)
    empty = torch.zeros(1, mask.shape[1], vision.channels, *vision.chunk_shape, device=model.device)
    with numerics(model.device, decoder.precision):
        return torch.cat([features, model.encode_vision(empty).to(features.dtype)])

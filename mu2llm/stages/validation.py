"""Reports on held-out cases while a stage trains: how good they are, how long they take, how far the policy has moved.

The model that trains writes them itself, in its worker, so that nothing is saved or loaded for it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Trainer, TrainerCallback

from mu2llm import storage
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.engine.decoder import ContinuousDecoder, Prompt, Text, write
from mu2llm.engine.features import read_scans
from mu2llm.engine.loading import load
from mu2llm.engine.log_probabilities import divergences
from mu2llm.engine.predictions import Prediction
from mu2llm.engine.sampling import Decoding
from mu2llm.evaluation.bootstrap import Bootstrap, Statistic
from mu2llm.evaluation.scoring import Texts, content
from mu2llm.green import load_judge
from mu2llm.model import Mu2ForConditionalGeneration, Mu2Processor
from mu2llm.records import Case, Estimate
from mu2llm.settings.inference import Precision
from mu2llm.stages.grounding import Gap
from mu2llm.stages.job import Job

METRICS = ("finding_f1", "green")
PREFIX = "validation/"


class Validation(TrainerCallback):
    """Logs `validation/<metric>` (and _low, _high) after the steps that the job's `watch` names; rank 0 does the work.

    Beside the scores: `grounding_gap`, `seconds_per_scan` of writing, `visual_tokens` a scan, and with `watch.kl` the
    divergence from the parent, `kl`.
    """

    def __init__(self, job: Job, trainer: Trainer, processor: Mu2Processor, shards: Shards) -> None:
        assert job.watch
        self.job, self.watch, self.trainer, self.processor, self.shards = job, job.watch, trainer, processor, shards
        self.steps = job.watch.steps(job.total_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step not in self.steps:
            return
        last = state.global_step == self.steps[-1]
        logged = self._measure(last) if state.is_world_process_zero else {}
        self.trainer.log(logged)  # on every rank: a report is a barrier

    def _measure(self, last: bool) -> dict[str, float]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        training = model.training
        model.eval()
        cases = self.shards.cases(self.watch.split)[: self.watch.cases]
        try:
            texts, numbers = self._reports(model, self.watch.split, cases)
            if last and self.watch.out:
                self._write(self.watch.split, cases, texts)
                if self.watch.then:
                    others = self.shards.cases(self.watch.then)
                    self._write(self.watch.then, others, self._reports(model, self.watch.then, others)[0])
        finally:
            model.train(training)
        estimates = score(cases, [text.text for text in texts], self.job.resolved)
        for name, estimate in estimates.items():
            if estimate:
                ends = {"": estimate.value, "_low": estimate.low, "_high": estimate.high}
                numbers |= {f"{name}{end}": value for end, value in ends.items()}
        return {f"{PREFIX}{name}": value for name, value in numbers.items()}

    def _write(self, split: str, cases: list[Case], texts: list[Text]) -> None:
        question = self.job.resolved.evaluation.question
        write_reports(self.watch.table(split), cases, texts, question)

    def _reports(
        self, model: Mu2ForConditionalGeneration, split: str, wanted: list[Case]
    ) -> tuple[list[Text], dict[str, float]]:
        settings, precision = self.job.resolved.evaluation, self.job.settings.precision
        decoder = ContinuousDecoder(model, self.processor, precision)
        decoding = Decoding(settings.max_new_tokens, seed=self.job.resolved.seed)
        texts: list[Text] = []
        seconds, divergence, tokens = 0.0, 0.0, 0
        gap = Gap(self.processor, settings.question, precision)
        for cases, features, mask in self._batches(model, split, wanted):
            prompts = [Prompt(settings.question, case.id, decoding) for case in cases]
            started = time.perf_counter()
            written = [text for (text,) in write(decoder, features, mask, prompts, settings.max_sequences)]
            seconds += time.perf_counter() - started
            texts += written
            gap.add(model, cases, features, mask)
            if self.watch.kl and self.job.parent:
                reference = _reference(self.job.parent, precision, model.device.type)
                batch = self.processor.encode([settings.question] * len(cases), [text.text for text in written])
                inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
                inputs |= {"vision_features": features, "chunk_mask": mask}
                total, n = divergences(model, reference, inputs, precision)
                divergence, tokens = divergence + total, tokens + n
        numbers = {
            "n": float(len(texts)),
            "seconds_per_scan": seconds / len(texts),
            "visual_tokens": float(model.config.visual_tokens),
        }
        numbers |= {"kl": divergence / tokens} if tokens else {}
        return texts, numbers | ({} if gap.mean is None else {"grounding_gap": gap.mean})

    def _batches(
        self, model: Mu2ForConditionalGeneration, split: str, wanted: list[Case]
    ) -> Iterator[tuple[list[Case], Tensor, Tensor]]:
        """Cases, their vision features (b, T, n, E) and chunk mask (b, T)."""
        size, precision = self.job.resolved.evaluation.batch_size, self.job.settings.precision
        for start in range(0, len(wanted), size):
            cases = wanted[start : start + size]
            rows = np.arange(start, start + len(cases))
            yield cases, *read_scans(model, self.shards, split, rows, precision)


def write_reports(uri: str, cases: list[Case], texts: list[Text], question: str) -> None:
    """The reports as a table of predictions."""
    rows = [
        Prediction(
            **{"run": "policy", "case_id": case.id, "variant": "as_is", "region": None, "question": question},
            **{"index": 0, "text": text.text, "tokens": text.tokens, "finished": text.finished},
            **{"scan_of": case.id, "seed": 0},
        )
        for case, text in zip(cases, texts, strict=True)
    ]
    storage.write_table(uri, Prediction.table(rows))


def score(cases: list[Case], reports: list[str], experiment: Experiment) -> dict[str, Estimate | None]:
    """The metrics of reports with their intervals over patients."""
    bootstrap = Bootstrap([case.patient for case in cases], experiment.evaluation.bootstrap, experiment.seed)
    found = statistics(cases, reports, load_judge(experiment.judge))
    return {name: bootstrap.estimate(found[name]) for name in METRICS}


def statistics(cases: list[Case], reports: list[str], judge: Any) -> dict[str, Statistic]:
    """`METRICS` of reports before any interval; one that cannot be judged counts as 0, so that none wins by such."""
    texts = Texts(tuple(cases), tuple(case.report for case in cases), tuple(reports))
    scores = [judgement.score if judgement.valid else 0.0 for judgement in judge.judge(texts.pairs)]
    return {"finding_f1": content(texts)["finding_f1"], "green": Statistic.mean(scores)}


@functools.lru_cache(maxsize=1)
def _reference(uri: str, precision: Precision, device: Any) -> Mu2ForConditionalGeneration:
    """The parent, kept by a process that trains several times from it."""
    return load(uri, precision, device)[0]

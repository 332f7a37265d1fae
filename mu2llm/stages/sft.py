"""SFT stage: the language model learns to write the report from the scan's visual tokens.

The instruction is in the backbone's chat format and the loss is on the answer alone. With `freeze_vision` and
`cache_vision` each scan is encoded once, before training; every epoch then reads the features.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.errors import UserError
from mu2llm.evaluation.encode import encode_scans
from mu2llm.model import Mu2Processor, add_lora, build, load, load_vision, merge_lora
from mu2llm.records import Checkpoint
from mu2llm.stages import runner

COLUMNS = ["id", "report", "questions", "chunk_mask"]


def run(
    data: str, out: str, experiment: Experiment, init: str | None = None, progress: runner.Progress | None = None
) -> Checkpoint:
    """Trains on the `train` split of the shards at `data`, from the vision (or the whole model) of `init`."""
    shards = Shards.open(data)
    parent = Checkpoint.open(init) if init else None
    job = runner.job("sft", shards, out, experiment, parent=init)
    done = runner.finished(job)
    if done:
        return done
    settings = experiment.sft
    if settings.freeze_vision and settings.cache_vision:
        if parent is None:
            raise UserError("sft.cache_vision caches what a trained vision tower sees: name one with --init")
        job.features = encode_scans(init, shards, settings.cpus_per_worker, settings.gpus_per_worker).uri
    return runner.run(job, loop, progress)


def loop(job: runner.Job, resume: runner.Resume) -> None:
    """One worker: the model from its parent, the batches, the training, the merged checkpoint."""
    experiment, settings = job.resolved, job.resolved.sft
    shards = Shards.open(job.features or job.data)
    scan = "features" if job.features else "voxels"
    model, processor = start(job, [case.report for case in shards.cases("train")])
    if settings.freeze_vision:
        model.freeze_vision()
    if experiment.model.lora:
        model = add_lora(model, experiment.model.lora)
    question, seed = experiment.evaluation.question, experiment.seed
    batches = runner.Batches(
        job,
        resume,
        shards,
        [*COLUMNS, scan],
        lambda rows: collate(rows, scan, processor, question, settings.report_share, seed),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SftTrainer(model=model, args=TrainingArguments(**runner.arguments(job, folder)))
        trainer.batches = batches

        def finish(target: str) -> dict[str, float]:
            merge_lora(model).save_pretrained(target)
            processor.save_pretrained(target)
            return {}

        runner.train(trainer, job, resume, finish)


class SftTrainer(runner.Streamed, Trainer):
    """Nothing but the stream: the model's own loss, averaged over the answer tokens of all workers."""


def start(job: runner.Job, reports: list[str]) -> tuple[Any, Mu2Processor]:
    """The parent if it is a whole model, else a fresh one with the parent's vision tower and projector."""
    experiment = job.resolved
    if job.parent and Checkpoint.open(job.parent).lineage.stage != "contrastive":
        return load(job.parent)
    model, processor = build(experiment.model, experiment.data.spec, reports, experiment.seed)
    if job.parent:
        load_vision(model, job.parent)
    return model, processor


def instruction(
    report: str, questions: list[dict[str, str]], question: str, report_share: float, rng: np.random.Generator
) -> tuple[str, str]:
    """What is asked of a case this time, and the answer."""
    if not questions or rng.random() < report_share:
        return question, report
    chosen = questions[rng.integers(len(questions))]
    return chosen["question"], chosen["answer"]


def collate(
    rows: dict[str, Any], scan: str, processor: Mu2Processor, question: str, report_share: float, seed: int
) -> dict[str, Any]:
    """Rows → inputs: each case's report, or one of its questions in the share that `report_share` leaves."""
    asked = [
        instruction(report, json.loads(questions), question, report_share, np.random.default_rng([seed, int(row)]))
        for report, questions, row in zip(rows["report"], rows["questions"], rows["row"], strict=True)
    ]
    encoded = processor.encode([q for q, _ in asked], [a for _, a in asked])
    name = "vision_features" if scan == "features" else "volumes"
    return {
        "case_ids": list(rows["id"]),
        name: torch.as_tensor(np.asarray(rows[scan])),
        "chunk_mask": torch.as_tensor(np.asarray(rows["chunk_mask"])),
        **encoded,
    }

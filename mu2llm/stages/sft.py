"""SFT stage: the language model learns to write the report from the scan's visual tokens.

The instruction is in the backbone's chat format and the loss is on the answer alone. With `freeze_vision` and
`cache_vision` each scan is encoded once, before training; every epoch then reads the features. With `alignment`
the visual tokens are also held against the findings of the report, as the features were in the contrastive
stage: a language model from scratch learns to read them only once there is something to read.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from transformers import Trainer, TrainingArguments

from mu2llm import weights
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.errors import UserError
from mu2llm.evaluation.encode import encode_scans
from mu2llm.model import Mu2Processor, add_lora, build, load, load_vision, merge_lora
from mu2llm.model.contrastive import TextConditionedPooling
from mu2llm.records import Checkpoint
from mu2llm.stages import runner
from mu2llm.stages.texts import TextBank

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
    runner.check_resources(settings)
    if settings.freeze_vision and settings.cache_vision:
        if parent is None or init is None:
            raise UserError("sft.cache_vision caches what a trained vision tower sees: name one with --init")
        features = encode_scans(init, shards, settings.cpus_per_worker, settings.gpus_per_worker)
        job = job.model_copy(update={"features": features.uri})
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
    texts = align(model, experiment, shards) if settings.alignment else None
    question, seed = experiment.evaluation.question, experiment.seed
    batches = runner.Batches(
        job,
        resume,
        shards,
        [*COLUMNS, scan],
        lambda rows: collate(rows, scan, processor, texts, Asking(question, settings.report_share, seed)),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SftTrainer(model=model, args=TrainingArguments(**runner.arguments(job, folder)))
        trainer.batches, trainer.alignment = batches, settings.alignment

        def finish(target: str) -> dict[str, float]:
            if texts:
                del model.alignment
            merge_lora(model).save_pretrained(target)
            processor.save_pretrained(target)
            return {}

        runner.train(trainer, job, resume, finish)


class SftTrainer(runner.Streamed, Trainer):
    """The model's own loss, averaged over the answer tokens of all workers, and that of the alignment."""

    alignment: float

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        texts, targets = inputs.pop("text_embeddings", None), inputs.pop("targets", None)
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        if texts is not None:
            head, tokens = self.accelerator.unwrap_model(model).alignment, output.visual_tokens
            logits = head(texts, head.scan(tokens[:, None]), torch.ones_like(tokens[..., 0], dtype=torch.bool))
            apart = functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
            loss = loss + self.alignment * apart / self.args.gradient_accumulation_steps
        return (loss, output) if return_outputs else loss


def align(model: Any, experiment: Experiment, shards: Shards) -> TextBank:
    """Puts the head on the model that holds its visual tokens against findings; the findings' texts."""
    reports = [case.report for case in shards.cases("train")]
    texts = TextBank(weights.text_encoder(experiment.model.text_encoder), "finding", reports, experiment.seed)
    width = model.config.tokenizer_config.hidden_size
    model.alignment = TextConditionedPooling.fresh(width, texts.width)
    return texts


def start(job: runner.Job, reports: list[str]) -> tuple[Any, Mu2Processor]:
    """The parent if it is a whole model, else a fresh one with the parent's vision tower and projector."""
    experiment = job.resolved
    if job.parent and Checkpoint.open(job.parent).lineage.stage != "contrastive":
        return load(job.parent)
    model, processor = build(experiment.model, experiment.data.spec, reports, experiment.seed)
    if job.parent:
        load_vision(model, job.parent)
    return model, processor


@dataclass(frozen=True)
class Asking:
    """What is asked of a case: `question`, with its report as the answer, or in the share that `report_share`
    leaves one of the case's own questions."""

    question: str
    report_share: float
    seed: int

    def __call__(self, report: str, questions: str, row: int) -> tuple[str, str]:
        """Question and answer; `row` is the position in the stream, so that a resumed run asks the same."""
        own = json.loads(questions)
        rng = np.random.default_rng([self.seed, row])
        if not own or rng.random() < self.report_share:
            return self.question, report
        chosen = own[rng.integers(len(own))]
        return chosen["question"], chosen["answer"]


def collate(
    rows: dict[str, Any], scan: str, processor: Mu2Processor, texts: TextBank | None, asking: Asking
) -> dict[str, Any]:
    """Rows → inputs."""
    parts = zip(rows["report"], rows["questions"], rows["row"], strict=True)
    asked = [asking(report, questions, int(row)) for report, questions, row in parts]
    name = "vision_features" if scan == "features" else "volumes"
    return {
        "case_ids": list(rows["id"]),
        name: torch.as_tensor(np.asarray(rows[scan])),
        "chunk_mask": torch.as_tensor(np.asarray(rows["chunk_mask"])),
        **processor.encode([q for q, _ in asked], [a for _, a in asked]),
        **(texts.targets(rows["report"]) if texts else {}),
    }

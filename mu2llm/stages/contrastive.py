"""Contrastive stage: scans and what their reports say meet in one space.

Gives the vision tower that SFT starts from. Positives are whole reports, their sections, single sentences, or
the findings that the rules read in them (`contrastive.positives`); the loss is InfoNCE or the sigmoid of
SigLIP, with the negatives of all workers. The text encoder is frozen, or trained with the rest and kept in the
checkpoint (`contrastive.train_text_encoder`). SFT can start from M3D-CLIP's tower instead (`model.vision.weights`).
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from transformers import TrainingArguments

from mu2llm import weights
from mu2llm.cases import Shards, Stream
from mu2llm.config import Experiment
from mu2llm.model import Mu2ForContrastive, build_contrastive, save_text_encoder
from mu2llm.model.contrastive import fit_temperature
from mu2llm.progress import Logged
from mu2llm.records import Checkpoint
from mu2llm.stages import launch
from mu2llm.stages.job import Job, new_job
from mu2llm.stages.steps import ContrastiveTrainer, scan_inputs
from mu2llm.stages.texts import Positives, TextBank, TextTokens
from mu2llm.stages.trainer import arguments, train
from mu2llm.stages.worker import Batches, Resume

COLUMNS = ["id", "report", "voxels", "chunk_mask"]


def run(
    data: str,
    out: str,
    experiment: Experiment,
    init: str | None = None,
    progress: Logged | None = None,
    fresh: bool = False,
) -> Checkpoint:
    """Trains on the `train` split of the shards at `data`; the checkpoint appears at `out`.

    Run again it goes on, or gives what is done; `fresh` removes what is at `out` and starts over.
    """
    job = job_of(data, out, experiment, init, fresh=fresh)
    return launch.run(job, loop, progress)


def job_of(data: str, out: str, experiment: Experiment, init: str | None = None, **more: Any) -> Job:
    """What `run` does, as plain values; a UserError where its inputs do not fit together."""
    return new_job("contrastive", Shards.open(data), out, experiment, init, **more)


def loop(job: Job, resume: Resume) -> None:
    """One worker: the model, its trainer, the training, recall on held-out cases."""
    experiment, settings = job.resolved, job.resolved.contrastive
    shards = Shards.open(job.data)
    reports = [case.report for case in shards.cases("train")]
    encoder = weights.text_encoder(experiment.model.text_encoder, reports)
    trained = encoder if settings.train_text_encoder else None
    texts: Positives = (
        TextTokens(encoder, settings.positives, reports)
        if trained
        else TextBank(encoder, settings.positives, reports, experiment.seed)
    )
    if settings.loss == "infonce":
        texts.compared = []  # it can only compare what some scan of the batch has
    model = build_contrastive(
        experiment.model, shards.spec, settings, texts.width, job.parent, experiment.seed, trained
    )
    if isinstance(texts, TextBank):
        model.keep_whitening(torch.as_tensor(texts.centre), torch.as_tensor(texts.whiten, dtype=torch.float32))
    batches = Batches(job, resume, shards, COLUMNS, lambda rows: collate(rows, texts))
    with tempfile.TemporaryDirectory() as folder:
        trainer = ContrastiveTrainer(model=model, args=TrainingArguments(**arguments(job, folder, model)))
        trainer.batches = batches

        def finish(model: Mu2ForContrastive, target: str) -> dict[str, float]:
            has, logits = held_out(model.eval(), shards, texts)
            if logits.numel():
                model.head.temperature.fill_(fit_temperature(logits, has.T > 0, settings.loss))
            model.save_pretrained(target)
            save_text_encoder(encoder, target, settings.train_text_encoder, experiment.model.text_encoder)
            return {**recall(has, logits), "temperature": float(model.head.temperature)}

        def restore(saved: str) -> Mu2ForContrastive:
            return Mu2ForContrastive.from_pretrained(saved).to(trainer.args.device)  # type: ignore[arg-type]

        train(trainer, job, resume, finish, restore)


def collate(rows: dict[str, Any], texts: Positives) -> dict[str, Any]:
    """Rows of the shards → the model's inputs."""
    return {
        "case_ids": list(rows["id"]),
        **scan_inputs(rows, "voxels"),
        **texts.targets(rows["report"]),
    }


@torch.no_grad()
def held_out(model: Mu2ForContrastive, shards: Shards, texts: Positives) -> tuple[torch.Tensor, torch.Tensor]:
    """Of split `validation`: which of its distinct texts each report has (n, M), their logits with each scan (M, n)."""
    parts = [set(texts.split(case.report)) for case in shards.cases("validation")]
    distinct = sorted(set().union(*parts))
    if not distinct:
        return torch.zeros(len(parts), 0), torch.zeros(0, len(parts))
    has = torch.tensor([[text in part for text in distinct] for part in parts], dtype=torch.float32)
    embeddings = model.embed_texts(**{name: tensor.to(model.device) for name, tensor in texts.inputs(distinct).items()})
    columns = []
    for rows in Stream(shards, "validation", ["id", "voxels", "chunk_mask"], batch_size=16, seed=None):
        voxels, mask = (torch.as_tensor(np.asarray(rows[name])).to(model.device) for name in ("voxels", "chunk_mask"))
        columns.append(model.score(voxels, mask, embeddings).cpu())
    return has, torch.cat(columns, dim=1)


def recall(has: torch.Tensor, logits: torch.Tensor) -> dict[str, float]:
    """recall@1 and @5 of finding a held-out case's report by its scan, and chance = 1/n; from what `held_out` gives.

    A report's score for a scan is how likely the scan has the report's texts and no others of the split. Reports
    of equal score share their places: five reports without findings are each found first one time in five.
    """
    if not len(has):
        return {"recall_n": 0.0}
    scores = has @ functional.logsigmoid(logits) + (1 - has) @ functional.logsigmoid(-logits)
    own = scores.diagonal()
    better, equal = (scores > own + 1e-5).sum(0), ((scores - own).abs() <= 1e-5).sum(0)
    return {
        **{f"recall_at_{k}": float(((k - better).clamp(min=0) / equal).clamp(max=1).mean()) for k in (1, 5)},
        "chance_at_1": 1 / len(has),
        "recall_n": float(len(has)),
    }

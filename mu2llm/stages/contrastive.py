"""Contrastive stage: scans and the sentences of their reports meet in one space.

Gives the vision tower and the projector that SFT starts from. Positives are whole reports, their sections, or
single sentences (`contrastive.positives`); the loss is InfoNCE or the sigmoid of SigLIP, with the negatives
of all workers.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed.nn
from transformers import Trainer, TrainingArguments

from mu2llm import weights
from mu2llm.cases import Shards, Stream
from mu2llm.config import Experiment
from mu2llm.green import sentences
from mu2llm.model import Mu2ForContrastive, build_contrastive
from mu2llm.records import Checkpoint
from mu2llm.stages import runner

COLUMNS = ["id", "report", "voxels", "chunk_mask"]


def run(
    data: str, out: str, experiment: Experiment, init: str | None = None, progress: runner.Progress | None = None
) -> Checkpoint:
    """Trains on the `train` split of the shards at `data`; the checkpoint appears at `out`."""
    shards = Shards.open(data)
    job = runner.job("contrastive", shards, out, experiment, parent=init)
    return runner.run(job, loop, progress)


def loop(job: runner.Job, resume: runner.Resume) -> None:
    """One worker: the model, its trainer, the training, recall on held-out cases."""
    experiment, settings = job.resolved, job.resolved.contrastive
    shards = Shards.open(job.data)
    encoder = weights.text_encoder(experiment.model.text_encoder)
    texts = SentenceBank(encoder, settings.positives, [case.report for case in shards.cases("train")], experiment.seed)
    model = build_contrastive(experiment.model, shards.spec, settings, texts.width, job.parent, experiment.seed)
    batches = runner.Batches(job, resume, shards, COLUMNS, lambda rows: collate(rows, texts))
    with tempfile.TemporaryDirectory() as folder:
        trainer = ContrastiveTrainer(model=model, args=TrainingArguments(**runner.arguments(job, folder)))
        trainer.batches = batches

        def finish(target: str) -> dict[str, float]:
            model.save_pretrained(target)
            return recall(model.eval(), shards, texts)

        runner.train(trainer, job, resume, finish)


class ContrastiveTrainer(runner.Streamed, Trainer):
    """The loss sees the embeddings of all workers; the gradient flows back through the gathering."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        output = model(**inputs, gather=gather if torch.distributed.is_initialized() else None)
        return (output.loss, output) if return_outputs else output.loss


def gather(local: torch.Tensor) -> torch.Tensor:
    """(n, …) of each worker → (N, …) of all, in rank order, also where the workers' n differ; differentiable."""
    size = torch.tensor([len(local)], device=local.device)
    sizes = [torch.zeros_like(size) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(sizes, size)
    longest = int(max(sizes))
    padding = local.new_zeros((longest - len(local), *local.shape[1:]))
    parts = torch.distributed.nn.functional.all_gather(torch.cat([local, padding]))
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])


class SentenceBank:
    """Embeddings of positives, each distinct text embedded once, centred on the mean of a sample.

    All reports speak of the same anatomy: uncentred, their embeddings are nearly one vector.
    """

    def __init__(self, encoder: weights.TextEncoder, positives: str, reports: list[str], seed: int) -> None:
        self.encoder, self.positives = encoder, positives
        self.known: dict[str, np.ndarray] = {}
        rng = np.random.default_rng(seed)
        sample = [reports[i] for i in rng.permutation(len(reports))[:64]]
        self.centre = np.mean(self._embed(sorted({t for report in sample for t in self.split(report)})), axis=0)
        self.width = len(self.centre)

    def split(self, report: str) -> list[str]:
        """The positives of a report: itself, its sections or its sentences, each once."""
        if self.positives == "report":
            return [report]
        if self.positives == "section":
            parts = re.split(r"(?i)\b(?=(?:findings|impression)\s*:)", report)
            return [part.strip() for part in parts if part.strip()]
        return list(dict.fromkeys(sentences(report)))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(M, D) float32, centred and normalised."""
        new = sorted(set(texts) - self.known.keys())
        if new:
            self.known.update(zip(new, self._embed(new), strict=True))
        centred = np.stack([self.known[text] for text in texts]) - self.centre
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)

    def _embed(self, texts: list[str]) -> np.ndarray:
        return np.asarray(self.encoder.embed(texts), dtype=np.float32)


def collate(rows: dict[str, Any], texts: SentenceBank) -> dict[str, Any]:
    """Rows of the shards → the model's inputs; each text's `owner` is its case's place in the batch.

    A text that several cases of the batch share is a positive of them all (`targets`, (M, B)).
    """
    parts = [texts.split(report) for report in rows["report"]]
    distinct = list(dict.fromkeys(text for part in parts for text in part))
    targets = np.array([[text in part for part in map(set, parts)] for text in distinct], dtype=bool)
    return {
        "case_ids": list(rows["id"]),
        "volumes": torch.as_tensor(np.asarray(rows["voxels"])),
        "chunk_mask": torch.as_tensor(np.asarray(rows["chunk_mask"])),
        "text_embeddings": torch.as_tensor(texts(distinct)),
        "targets": torch.as_tensor(targets),
    }


@torch.no_grad()
def recall(
    model: Mu2ForContrastive, shards: Shards, texts: SentenceBank, split: str = "validation"
) -> dict[str, float]:
    """recall@1 and @5 of finding a held-out case's report by its scan, and chance = 1/n.

    A report's score for a scan is the mean of its texts' logits.
    """
    cases = shards.cases(split)
    if len(cases) < 2:
        return {"recall_n": float(len(cases))}
    parts = [texts.split(case.report) for case in cases]
    embeddings = torch.as_tensor(texts([text for part in parts for text in part]))
    columns = []
    for rows in Stream(shards, split, COLUMNS, batch_size=16, seed=None):
        batch = collate(rows, texts)
        device = model.device
        logits = model.score(batch["volumes"].to(device), batch["chunk_mask"].to(device), embeddings.to(device))
        columns.append(logits.cpu())
    scores = torch.stack([part.mean(0) for part in torch.cat(columns, dim=1).split([len(p) for p in parts])])
    place = (scores > scores.diagonal()).sum(0)
    return {
        "recall_at_1": float((place < 1).float().mean()),
        "recall_at_5": float((place < 5).float().mean()),
        "chance_at_1": 1 / len(cases),
        "recall_n": float(len(cases)),
    }

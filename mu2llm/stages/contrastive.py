"""Contrastive stage: scans and what their reports say meet in one space.

Gives the vision tower that SFT starts from. Positives are whole reports, their sections, single sentences, or
the findings that the rules read in them (`contrastive.positives`); the loss is InfoNCE or the sigmoid of
SigLIP, with the negatives of all workers. The text encoder is frozen, or trained with the rest and kept in the
checkpoint (`contrastive.train_text_encoder`). With `freeze_vision` the head alone is trained, as a projection of a
tower of the field: its features are computed once. SFT can start from a tower by itself too (`model.vision.weights`).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from transformers import TrainingArguments

from mu2llm import weights
from mu2llm.cases import Shards, Stream
from mu2llm.config import Experiment
from mu2llm.engine.features import encode_scans, scan_features
from mu2llm.model import Mu2ForContrastive, build_contrastive, save_text_encoder
from mu2llm.model.contrastive import fit_temperature
from mu2llm.progress import Logged
from mu2llm.records import Checkpoint
from mu2llm.settings.stages import FINDINGS
from mu2llm.stages import launch, placement, tower
from mu2llm.stages.job import Job, finished, new_job
from mu2llm.stages.launch import scan_by_scan
from mu2llm.stages.steps import ContrastiveTrainer, scan_inputs
from mu2llm.stages.texts import Positives, TextBank, TextTokens
from mu2llm.stages.trainer import arguments, train
from mu2llm.stages.worker import Batches, Resume

logger = logging.getLogger(__name__)
COLUMNS = ["id", "report", "chunk_mask"]


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
    done = finished(job)
    if done:
        return done
    if experiment.contrastive.freeze_vision:
        placement.check(job)
        shards = Shards.open(job.data)
        start = job.parent or tower.checkpoint(job, shards)
        features = encode_scans(start, shards, job.settings.inference(), scan_by_scan(progress))
        job = job.model_copy(update={"features": features.uri})
    trained = launch.run(job, loop, progress)
    warn_of_missed_findings(trained)
    return trained


def job_of(data: str, out: str, experiment: Experiment, init: str | None = None, **more: Any) -> Job:
    """What `run` does, as plain values; a UserError where its inputs do not fit together."""
    return new_job("contrastive", Shards.open(data), out, experiment, init, **more)


def loop(job: Job, resume: Resume) -> None:
    """One worker: the model, its trainer, the training, recall on held-out cases."""
    experiment, settings = job.resolved, job.resolved.contrastive
    shards = Shards.open(job.features or job.data)
    scan = "features" if job.features else "voxels"
    start = job.parent or (str(getattr(shards.index, "checkpoint")) if job.features else None)  # noqa: B009
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
    model = build_contrastive(experiment.model, shards.spec, settings, texts.width, start, experiment.seed, trained)
    if settings.freeze_vision:
        model.vision.freeze()
    if isinstance(texts, TextBank):
        model.keep_whitening(torch.as_tensor(texts.centre), torch.as_tensor(texts.whiten, dtype=torch.float32))
    batches = Batches(job, resume, shards, [*COLUMNS, scan], lambda rows: collate(rows, texts, scan))
    with tempfile.TemporaryDirectory() as folder:
        trainer = ContrastiveTrainer(model=model, args=TrainingArguments(**arguments(job, folder, model)))
        trainer.batches = batches

        def finish(model: Mu2ForContrastive, target: str) -> dict[str, float]:
            distinct, has, logits = held_out(model.eval(), shards, texts)
            metrics: dict[str, float] = {}
            if logits.numel():
                if settings.positives in FINDINGS and settings.loss == "sigmoid":
                    metrics = findings_f1(distinct, has, logits)
                model.head.temperature.fill_(fit_temperature(logits, has, settings.loss))
            model.save_pretrained(target)
            save_text_encoder(encoder, target, settings.train_text_encoder, experiment.model.text_encoder)
            return {"temperature": float(model.head.temperature), **metrics}

        def restore(saved: str) -> Mu2ForContrastive:
            return Mu2ForContrastive.from_pretrained(saved).to(trainer.args.device)  # type: ignore[arg-type]

        train(trainer, job, resume, finish, restore, lambda model: recall(model, shards, texts))


def collate(rows: dict[str, Any], texts: Positives, scan: str = "voxels") -> dict[str, Any]:
    """Rows of the shards → the model's inputs."""
    return {
        "case_ids": list(rows["id"]),
        **scan_inputs(rows, scan),
        **texts.targets(rows["report"]),
    }


FITTED = 256
"""Held-out scans that the temperature is fitted on."""
F1 = "f1/"
ENOUGH = 5
"""Held-out scans with a finding, for its F1 to say something."""
SCANS, TEXTS = 16, 128
"""Held-out scans, and texts against them, that are scored at a time."""


def held_out(
    model: Mu2ForContrastive, shards: Shards, texts: Positives
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Of the first `FITTED` scans of split `validation`: their M distinct texts, which of them each scan has, and the
    logits of each text with each scan, both (M, n)."""
    parts = [set(texts.split(case.report)) for case in shards.cases("validation")[:FITTED]]
    distinct = sorted(set().union(*parts))
    has = torch.tensor([[text in part for part in parts] for text in distinct], dtype=torch.bool)
    columns = [logits for _, logits in scored(model, shards, texts, distinct, len(parts))]
    logits = torch.cat(columns, dim=1) if columns else torch.zeros(0, 0)
    return distinct, has.view(len(distinct), len(parts)), logits


def findings_f1(findings: Sequence[str], has: torch.Tensor, logits: torch.Tensor) -> dict[str, float]:
    """`f1/FINDING` of the findings that at least `ENOUGH` held-out scans have: has, logits (M, n), and a scan is told
    to have what has a logit above 0."""
    f1 = 2 * ((logits > 0) & has).sum(1) / ((logits > 0).sum(1) + has.sum(1)).clamp(min=1)
    return {f"{F1}{findings[i]}": float(f1[i]) for i in torch.nonzero(has.sum(1) >= ENOUGH)[:, 0].tolist()}


def warn_of_missed_findings(checkpoint: Checkpoint) -> None:
    """Findings are learned all or nothing: names those that the head does not tell, here, where it is seen."""
    known = {name.removeprefix(F1): f1 for name, f1 in checkpoint.training.metrics.items() if name.startswith(F1)}
    missed = [f"{name} (F1 {f1:.2f})" for name, f1 in known.items() if f1 < 0.5]
    if missed:
        logger.warning(
            "%s: of the %d findings that at least %d held-out scans have, it does not tell %s; reports will lack them: "
            "more contrastive.epochs, more cases or another seed may help",
            *(checkpoint.uri, len(known), ENOUGH, ", ".join(missed)),
        )


@torch.no_grad()
def scored(
    model: Mu2ForContrastive, shards: Shards, texts: Positives, distinct: list[str], rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of the first scans of split `validation`, so many at a time, their rows (b,) and the texts' logits (M, b)."""
    groups = [distinct[first : first + TEXTS] for first in range(0, len(distinct), TEXTS)]
    moved = ({name: x.to(model.device) for name, x in texts.inputs(group).items()} for group in groups)
    embedded = [model.embed_texts(**group) for group in moved]
    if not embedded:
        return
    scan = "features" if "features" in shards.schema("validation").names else "voxels"
    for batch in Stream(shards, "validation", [scan, "chunk_mask"], batch_size=SCANS, seed=None, rows=rows):
        features, mask = scan_features(model, batch)
        logits = [model.score(None, mask, group, features).float().cpu() for group in embedded]
        yield torch.as_tensor(batch["row"]), torch.cat(logits)


def recall(model: Mu2ForContrastive, shards: Shards, texts: Positives) -> dict[str, float]:
    """recall@1 and @5 of finding a held-out case's report by its scan, and chance = 1/n.

    A report's score for a scan is how likely the scan has the report's texts and no others of the split: up to what
    all reports have in common, the sum of its texts' logits. Reports of equal score share their places: five reports
    without findings are each found first one time in five. A few scans are scored at a time.
    """
    parts = [set(texts.split(case.report)) for case in shards.cases("validation")]
    distinct = sorted(set().union(*parts))
    if not distinct:
        return {"recall_n": float(len(parts))}
    place = {text: number for number, text in enumerate(distinct)}
    own = [sorted(place[text] for text in part) for part in parts]
    rows, columns = ([row for row, each in enumerate(own) for _ in each], [text for each in own for text in each])
    has = csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(parts), len(distinct)))
    found = {1: 0.0, 5: 0.0}
    for some, logits in scored(model, shards, texts, distinct, len(parts)):
        scores = torch.as_tensor(has @ logits.numpy())
        of_own = scores.gather(0, some[None])
        better, equal = (scores > of_own + 1e-5).sum(0), ((scores - of_own).abs() <= 1e-5).sum(0)
        for k in found:
            found[k] += float(((k - better).clamp(min=0) / equal).clamp(max=1).sum())
    return {
        **{f"recall_at_{k}": total / len(parts) for k, total in found.items()},
        "chance_at_1": 1 / len(parts),
        "recall_n": float(len(parts)),
    }

"""SFT stage: the language model learns to write the report from the scan's visual tokens.

The instruction is in the backbone's chat format and the loss is on the answer alone. With `freeze_vision` and
`cache_vision` each scan is encoded once, before training; every epoch then reads the features. With `thaw_vision`
frozen vision is trained too after that share of the steps. With `alignment` the visual tokens are also held against
the findings of the report, as the features were in the contrastive stage: a language model learns to read them only
once there is something to read. With `alignment_first` that is all that the first share of the steps does: they leave
the language model out, whose steps are what costs where it is large.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments

from mu2llm import weights
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.engine.decoder import ContinuousDecoder, Prompt, write
from mu2llm.engine.features import encode_scans, read_scans
from mu2llm.engine.loading import place
from mu2llm.engine.sampling import Decoding
from mu2llm.errors import UserError
from mu2llm.model import (
    Mu2Processor,
    add_lora,
    add_prior,
    build,
    build_processor,
    load,
    load_lora,
    load_processor,
    load_vision,
    merge_lora,
)
from mu2llm.model.text_pooling import AlignmentHead
from mu2llm.progress import Logged
from mu2llm.records import Checkpoint
from mu2llm.settings.stages import FINDINGS
from mu2llm.stages import launch, lengths, placement, tower
from mu2llm.stages.grounding import Gap
from mu2llm.stages.held_out import HeldOut
from mu2llm.stages.job import LOSS, Job, Watch, finished, new_job
from mu2llm.stages.launch import scan_by_scan
from mu2llm.stages.lengths import shortened
from mu2llm.stages.steps import SftTrainer, scan_inputs
from mu2llm.stages.texts import TextBank, most_frequent
from mu2llm.stages.trainer import arguments, train
from mu2llm.stages.training_scans import remember
from mu2llm.stages.validation import PREFIX, Validation, score
from mu2llm.stages.worker import Batches, Resume

logger = logging.getLogger(__name__)
COLUMNS = ["id", "report", "questions", "chunk_mask"]


def run(
    data: str,
    out: str,
    experiment: Experiment,
    init: str | None = None,
    progress: Logged | None = None,
    watch: Watch | None = None,
    fresh: bool = False,
) -> Checkpoint:
    """Trains on the `train` split of the shards at `data`, from the vision (or the whole model) of `init`.

    Run again it goes on, or gives what is done; `fresh` removes what is at `out` and starts over.
    """
    shards = Shards.open(data)
    job = job_of(data, out, experiment, init, watch=watch, fresh=fresh)
    done = finished(job)
    if done:
        return done
    settings = experiment.sft
    job = job.model_copy(update={"rows": check_lengths(job, shards)})
    placement.check(job)
    if job.validation and not shards.count("validation"):
        raise UserError(f"sft.validation.steps is set, but {shards.uri} has no rows in split validation")
    if settings.cached:
        trained = init or experiment.model.tokenizer.weights
        if trained is None and experiment.model.vision.weights:
            trained = tower.checkpoint(job, shards)
        if trained is None:
            raise UserError(
                "sft.cache_vision caches what trained vision sees: name a checkpoint with --init or "
                "model.tokenizer.weights, or a tower's weights with model.vision.weights"
            )
        features = encode_scans(trained, shards, settings.inference(), scan_by_scan(progress))
        job = job.model_copy(update={"features": features.uri})
    return launch.run(job, loop, progress, HeldOut(settings.validation, measure, export))


def job_of(data: str, out: str, experiment: Experiment, init: str | None = None, **more: Any) -> Job:
    """What `run` does, as plain values; a UserError where its inputs do not fit together."""
    return new_job("sft", Shards.open(data), out, experiment, init, **more)


def loop(job: Job, resume: Resume) -> None:
    """One worker: the model from its parent, the batches, the training, the merged checkpoint."""
    experiment, settings = job.resolved, job.resolved.sft
    shards = Shards.open(job.features or job.data)
    scan = "features" if job.features else "voxels"
    ids, reports = training_cases(job, shards)
    model, processor = start(job, reports)
    skipped = longer(job, shards, processor) if settings.too_long == "skip" else {}
    kept = {name: len(report) for name, report in zip(ids, reports, strict=True) if name not in skipped}
    if settings.freeze_vision and settings.thaw_vision is None:
        model.freeze_vision()
    if settings.freeze_language_model:
        model.freeze_language_model()
    texts = align(model, experiment, reports, finding_kind(job.parent)) if settings.alignment else None
    whole = model
    if experiment.model.lora:
        model = add_lora(model, experiment.model.lora, ["alignment"] if texts else [])
    reader = copy.deepcopy(processor)  # for the thread that reads ahead
    fit = reader if settings.too_long == "truncate" else None
    asking = Instructions(experiment.evaluation.question, settings.report_share, experiment.seed, fit)
    batches = Batches(
        job,
        resume,
        shards,
        [*COLUMNS, scan],
        lambda rows: collate(rows, scan, reader, texts, asking),
        ids=list(kept) if len(kept) < shards.count("train") else None,
        lengths=list(kept.values()) if settings.group_by_length else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        alone = int(settings.alignment_first * job.total_steps)
        # what is frozen or left out at first has no gradient then
        unused = {"ddp_find_unused_parameters": settings.thaw_vision is not None or alone > 0}
        trainer = SftTrainer(model=model, args=TrainingArguments(**arguments(job, folder, model, **unused)))
        trainer.batches, trainer.processor = batches, processor
        trainer.prompt_hash = processor.prompt_hash
        trainer.alignment, trainer.alone = settings.alignment, alone
        if settings.thaw_vision is not None:
            trainer.add_callback(UnfreezeVision(whole.model.vision, int(settings.thaw_vision * job.total_steps)))
        if job.watch:
            trainer.add_callback(Validation(job, trainer, processor, shards))

        def finish(trained: Any, target: str) -> dict[str, float]:
            remember(save(trained, processor, target), job, shards, target)
            return {}

        train(trainer, job, resume, finish, lambda saved: restore(job, saved)[0])


def training_cases(job: Job, shards: Shards) -> tuple[list[str], list[str]]:
    """Ids and reports of the cases that the job trains on, in the rows' order."""
    reports = {case.id: case.report for case in shards.cases("train")}
    ids = shards.subset("train", job.resolved.data.fraction, job.resolved.seed)
    return ids, [reports[name] for name in ids]


def check_lengths(job: Job, shards: Shards) -> int:
    """The cases to train on; a UserError names those whose texts are too long, unless sft.too_long says otherwise."""
    experiment, settings = job.resolved, job.resolved.sft
    ids, reports = training_cases(job, shards)
    if job.parent and open_checkpoint(job.parent).lineage.stage != "contrastive":
        processor = load_processor(job.parent)
    else:
        processor = build_processor(experiment.model, experiment.data.spec, texts_of(experiment, reports))
        if job.parent and experiment.model.tokenizer.prior:
            prior_findings(job, shards)
    found = longer(job, shards, processor)
    lengths.settle(found, len(ids), processor.max_text_tokens, settings.too_long)
    return len(ids) - len(found) if settings.too_long == "skip" else len(ids)


def longer(job: Job, shards: Shards, processor: Mu2Processor) -> dict[str, int]:
    """Cases that the job trains on and the model takes only in part → their tokens."""
    experiment = job.resolved
    chosen = set(shards.subset("train", experiment.data.fraction, experiment.seed))
    asked = {
        case.id: lengths.asked_of(case, experiment.evaluation.question, experiment.sft.report_share)
        for case in shards.cases("train")
        if case.id in chosen
    }
    return lengths.too_long(processor, asked)


class UnfreezeVision(TrainerCallback):
    """Vision is frozen up to a step; its weights are in the optimiser from the start, which passes them over."""

    def __init__(self, vision: Any, step: int) -> None:
        self.vision, self.step = vision, step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < self.step:
            self.vision.freeze()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.vision.unfreeze()


def save(model: Any, processor: Mu2Processor, folder: str) -> Any:
    """Saves, and gives, the plain model: LoRA merged, without the head that aligned it."""
    merged = merge_lora(model)
    merged.alignment = None
    merged.save_pretrained(folder)
    processor.save_pretrained(folder)
    return merged


def align(model: Any, experiment: Experiment, reports: list[str], positives: str = "finding") -> TextBank:
    """Puts the head on the model that holds its visual tokens against findings; the findings' texts."""
    encoder = weights.text_encoder(experiment.model.text_encoder, reports)
    texts = TextBank(encoder, positives, reports, experiment.seed)
    scaled = model.config.tokenizer.output_scale != "none"
    model.alignment = AlignmentHead(model.config.text.hidden_size, texts.width, scaled)
    return texts


def start(job: Job, reports: list[str]) -> tuple[Any, Mu2Processor]:
    """The parent if it is a whole model, else a fresh one with the parent's vision, or with vision and tokenizer of
    `model.tokenizer.weights`."""
    experiment = job.resolved
    if job.parent and open_checkpoint(job.parent).lineage.stage != "contrastive":
        return load(job.parent, torch.float32)
    model, processor = build(experiment.model, experiment.data.spec, texts_of(experiment, reports), experiment.seed)
    if job.parent:
        load_vision(model, job.parent)
        if experiment.model.tokenizer.prior:
            findings = prior_findings(job, Shards.open(job.data))
            add_prior(model, processor, job.parent, findings, experiment.model.tokenizer.prior_names)
    return model, processor


def prior_findings(job: Job, shards: Shards) -> list[str]:
    """Those of the diagnostic prior: the most frequent of all training reports, which contrast was trained on."""
    reports = [case.report for case in shards.cases("train")]
    return most_frequent(reports, job.resolved.model.tokenizer.prior, finding_kind(job.parent))


def finding_kind(parent: str | None) -> str:
    """The findings that a contrastive checkpoint tells apart (`contrastive.positives`); of others those with sides."""
    checkpoint = open_checkpoint(parent) if parent else None
    contrastive = checkpoint and checkpoint.lineage.stage == "contrastive"
    positives = str(checkpoint.experiment["contrastive"]["positives"]) if checkpoint and contrastive else "finding"
    return positives if positives in FINDINGS else "finding"


def texts_of(experiment: Experiment, reports: list[str]) -> list[str]:
    """What language model `small` learns its tokenizer from: each report comes with the question."""
    return [*reports, *[experiment.evaluation.question] * len(reports)]


# ---- held-out cases, beside the training


def measure(job: Job, folder: str, reports: bool) -> dict[str, float]:
    """Loss an answer's token of an intermediate checkpoint on held-out cases, its grounding gap; finding F1 and GREEN
    of its reports."""
    experiment, settings = job.resolved, job.resolved.sft.validation
    model, processor = restore(job, folder)
    precision = experiment.sft.precision
    model = place(model, precision, "cuda" if settings.gpus else "cpu")
    decoder, decoding = ContinuousDecoder(model, processor, precision), Decoding(experiment.evaluation.max_new_tokens)
    shards, question = Shards.open(job.features or job.data), experiment.evaluation.question
    cases = shards.cases("validation")[: settings.cases]
    total, tokens, gap, written = 0.0, 0, Gap(processor, question, precision), []
    for start in range(0, len(cases), experiment.sft.batch_size):
        some = cases[start : start + experiment.sft.batch_size]
        features, mask = read_scans(model, shards, "validation", np.arange(start, start + len(some)), precision)
        nats, counted = gap.add(model, some, features, mask)
        total, tokens = total - nats, tokens + counted
        few = max(0, min(len(some), settings.reports - start)) if reports else 0
        if few:
            prompts = [Prompt(question, case.id, decoding) for case in some[:few]]
            written += [text.text for (text,) in write(decoder, features[:few], mask[:few], prompts)]
    cut = sum(processor.text_tokens(question, case.report) > processor.max_text_tokens for case in cases)
    if cut:
        logger.warning(
            "%s: %d of %d held-out reports are longer than the model takes and were cut", job.out, cut, len(cases)
        )
    metrics = {LOSS: total / tokens}
    if gap.mean is not None:
        metrics[f"{PREFIX}grounding_gap"] = gap.mean
    if written:
        scores = score(cases[: len(written)], written, experiment)
        metrics |= {f"{PREFIX}{name}": estimate.value for name, estimate in scores.items() if estimate}
    return metrics


def restore(job: Job, folder: str) -> tuple[Any, Mu2Processor]:
    """The model of an intermediate checkpoint's folder, LoRA merged."""
    if not job.resolved.model.lora:
        return load(folder)
    _, reports = training_cases(job, Shards.open(job.data))
    model, processor = start(job, reports)
    if job.resolved.sft.alignment:
        align(model, job.resolved, reports, finding_kind(job.parent))
    return merge_lora(load_lora(model, folder)), processor


def export(job: Job, folder: str, target: str) -> None:
    """An intermediate checkpoint as the folder that is published."""
    remember(save(*restore(job, folder), target), job, Shards.open(job.features or job.data), target)


@dataclass(frozen=True)
class Instructions:
    """What is asked of a case: `question`, with its report as the answer, or in the share that `report_share`
    leaves one of the case's own questions. Answers are cut to what the processor takes, where there is one here."""

    question: str
    report_share: float
    seed: int
    processor: Mu2Processor | None = None

    def __call__(self, report: str, questions: str, row: int) -> tuple[str, str]:
        """Question and answer; `row` is the position in the stream, so that a resumed run asks the same."""
        asked, answer = self._chosen(report, questions, row)
        return asked, shortened(self.processor, asked, answer) if self.processor else answer

    def _chosen(self, report: str, questions: str, row: int) -> tuple[str, str]:
        own = json.loads(questions)
        rng = np.random.default_rng([self.seed, row])
        if not own or rng.random() < self.report_share:
            return self.question, report
        chosen = own[rng.integers(len(own))]
        return chosen["question"], chosen["answer"]


def collate(
    rows: dict[str, Any], scan: str, processor: Mu2Processor, texts: TextBank | None, instructions: Instructions
) -> dict[str, Any]:
    """Rows → inputs."""
    parts = zip(rows["report"], rows["questions"], rows["row"], strict=True)
    asked = [instructions(report, questions, int(row)) for report, questions, row in parts]
    aligned = texts.targets(rows["report"]) if texts else None
    return {
        "case_ids": list(rows["id"]),
        **scan_inputs(rows, scan),
        **processor.encode([q for q, _ in asked], [a for _, a in asked]),
        "right_padded": True,
        **({name: aligned[name] for name in ("text_embeddings", "targets")} if aligned else {}),
    }

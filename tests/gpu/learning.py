"""Contrast, SFT and DPO of preset demo on phantoms in bf16, each for so many seconds: do they learn?"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from machine import Machine
from rows import Row
from transformers import TrainerCallback, TrainingArguments

from mu2llm import config, weights
from mu2llm.ct import CTVolume, phantom, prepare
from mu2llm.engine.loading import place
from mu2llm.engine.log_probabilities import sequence_logps
from mu2llm.model import build, build_contrastive, load_vision
from mu2llm.records import PreferencePair
from mu2llm.stages.steps import ContrastiveTrainer, SftTrainer, scan_inputs
from mu2llm.stages.texts import TextBank

CASES, BATCH = 384, 16
SMALL = ["model.vision.hidden_size=32", "model.vision.num_heads=2", "model.tokenizer.queries=4",
         "model.tokenizer.num_heads=2", "model.small.hidden_size=32", "model.small.num_layers=1",
         "model.small.mlp_dim=64", "model.small.num_heads=2"]  # fmt: skip


class Phantoms:
    """Scans and reports of the size of preset demo, and endless random batches of them."""

    def __init__(self, machine: Machine) -> None:
        self.experiment = config.load("demo", [*(SMALL if machine.small else []), "model.text_encoder=small"])
        made = [phantom.make(seed=0, index=index) for index in range(16 if machine.small else CASES)]
        self.scans = [prepare(CTVolume(each.hu, each.affine), self.experiment.data.spec) for each in made]
        self.reports = [each.report for each in made]
        self.batch = 8 if machine.small else BATCH

    def picks(self) -> Iterator[list[int]]:
        rng = np.random.default_rng(0)
        while True:
            order = rng.permutation(len(self.reports))
            yield from (order[i : i + self.batch].tolist() for i in range(0, len(order) - self.batch + 1, self.batch))

    def rows(self, pick: list[int]) -> dict[str, Any]:
        """As a stream gives them."""
        voxels, mask = (np.stack([getattr(self.scans[i], name) for i in pick]) for name in ("voxels", "chunk_mask"))
        return {"id": [str(i) for i in pick], "item": pick, "voxels": voxels, "chunk_mask": mask}

    def batches(self, of: Callable[[list[int]], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for pick in self.picks():
            rows = self.rows(pick)
            yield {"case_ids": rows["id"], **scan_inputs(rows, "voxels"), **of(pick)}


def check(machine: Machine) -> Iterator[Row]:
    data = Phantoms(machine)
    folder = str(machine.scratch / "contrastive")
    yield from _contrast(machine, data, folder)
    writer, processor = build(data.experiment.model, data.experiment.data.spec, data.reports, seed=0)
    load_vision(writer, folder)
    writer.freeze_vision()
    question = data.experiment.evaluation.question

    def answers(pick: list[int]) -> dict[str, Any]:
        encoded = processor.encode([question] * len(pick), [data.reports[i] for i in pick])
        return {**encoded, "right_padded": True}

    sft = SftTrainer(model=writer, args=TrainingArguments(**_arguments(machine, data.experiment.sft.learning_rate)))
    yield _falls("SFT", _train(machine, sft, data.batches(answers)))
    try:
        yield from _prefer(machine, data, writer, processor)
    except ModuleNotFoundError as error:
        yield Row("learning", "DPO", "it falls", f"needs {error.name}", "skipped")


def _contrast(machine: Machine, data: Phantoms, folder: str) -> Iterator[Row]:
    experiment = data.experiment
    texts = TextBank(weights.text_encoder("small", data.reports), "finding", data.reports, 0)
    model = build_contrastive(experiment.model, experiment.data.spec, experiment.contrastive, texts.width)
    given = TrainingArguments(**_arguments(machine, experiment.contrastive.learning_rate))
    trainer = ContrastiveTrainer(model=model, args=given)
    log = _train(machine, trainer, data.batches(lambda pick: texts.targets([data.reports[i] for i in pick])))
    model.save_pretrained(folder)
    yield _falls("contrast", log)
    expected = float(np.mean([len(set(texts.split(report))) for report in data.reports])) * data.batch
    seen = float(np.mean([entry["positives"] for entry in log]))
    kept = 0.8 < seen / expected < 1.25  # batches differ in how much their reports say
    what = f"contrast: positives a step, of about {expected:.0f} that the reports have"
    yield Row("learning", what, "all are kept", f"{seen:.1f}", "ok" if kept else "missed", seen)


def _prefer(machine: Machine, data: Phantoms, writer: Any, processor: Any) -> Iterator[Row]:
    """A scan's report against one that says nothing."""
    import datasets
    from trl import DPOConfig

    from mu2llm.stages.dpo_step import Examples, Mu2DPOTrainer, loss_arguments

    writer.freeze_statistics()
    values = {"prompt": data.experiment.evaluation.question, "chosen_score": 1.0, "rejected_score": 0.0, "judge": "–"}
    pairs = [
        PreferencePair(case_id=str(i), chosen=report, rejected="No finding.", **values)
        for i, report in enumerate(data.reports)
    ]
    frozen, reference = place(copy.deepcopy(writer), "bf16", writer.device.type), []
    plain = Examples(pairs, None, processor)
    for first in range(0, len(pairs), data.batch):
        batch = plain.collate(data.rows(list(range(first, min(first + data.batch, len(pairs))))), "voxels")
        del batch["case_ids"]
        batch = {k: v.to(writer.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        reference.append(torch.stack(sequence_logps(frozen, batch, None, "bf16").chunk(2), 1).cpu().numpy())
    examples = Examples(pairs, np.concatenate(reference), processor)
    rate = 1e-3 if machine.small else data.experiment.dpo.learning_rate
    arguments = _arguments(machine, rate) | loss_arguments(data.experiment.dpo)
    trainer = Mu2DPOTrainer(
        model=writer,
        args=DPOConfig(**arguments),
        train_dataset=datasets.Dataset.from_list([{"prompt": "", "chosen": "", "rejected": ""}]),
        data_collator=examples.collator,
        processing_class=processor.tokenizer,
    )
    log = _train(machine, trainer, (examples.collate(data.rows(pick), "voxels") for pick in data.picks()))
    yield _falls("DPO", log)
    start = log[0]["kl"]
    verdict = "ok" if abs(start) < 0.5 else "missed"
    what = "DPO: log reference − log policy at its start, nats a report"
    yield Row("learning", what, "≈ 0", f"{start:.3f}", verdict, start)


def _arguments(machine: Machine, learning_rate: float) -> dict[str, Any]:
    size = (
        {"max_steps": 8, "logging_steps": 1, "warmup_steps": 1}
        if machine.small
        else {"max_steps": 100_000, "logging_steps": 10, "warmup_steps": 20}
    )
    return {
        **{"output_dir": str(machine.scratch), "save_strategy": "no", "report_to": [], "disable_tqdm": True, **size},
        **{"learning_rate": learning_rate, "lr_scheduler_type": "constant_with_warmup", "bf16": True},
        **{"use_cpu": not machine.cuda, "remove_unused_columns": False, "logging_nan_inf_filter": False},
        "activation_checkpointing": False,
    }


def _train(machine: Machine, trainer: Any, batches: Iterator[dict[str, Any]]) -> list[dict[str, float]]:
    trainer.batches = batches
    trainer.add_callback(_Until(time.monotonic() + machine.seconds))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class _Until(TrainerCallback):
    def __init__(self, end: float) -> None:
        self.end = end

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() > self.end:
            control.should_training_stop = True


def _falls(stage: str, log: list[dict[str, float]]) -> Row:
    """The loss of the last quarter against the first."""
    losses = [entry["loss"] for entry in log]
    part = max(1, len(losses) // 4)
    first, last = float(np.mean(losses[:part])), float(np.mean(losses[-part:]))
    steps = int(log[-1]["step"])
    verdict = "ok" if last < first else "missed"
    return Row("learning", f"{stage}: loss over {steps} steps", "it falls", f"{first:.3f} → {last:.3f}", verdict, last)

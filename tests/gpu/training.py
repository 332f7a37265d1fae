"""A step of each stage at the paper's size: seconds, share of the peak, memory against the memory model, waits."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import parity
import torch
from machine import Machine
from rows import Row, told, within
from synchronisations import Synchronisations
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainingArguments

from mu2llm import config
from mu2llm.config import Experiment
from mu2llm.model import Mu2ForConditionalGeneration, add_lora, build_contrastive, configuration
from mu2llm.model.memory import GIB, QUESTION_TOKENS, TEXTS_PER_CASE, Stage, training_memory
from mu2llm.model.summary import text_config
from mu2llm.settings.model import LoraSettings
from mu2llm.settings.section import merged
from mu2llm.stages.steps import ContrastiveTrainer, SftTrainer

WARM, COUNTED, TIMED = 2, 3, 3
STEPS = WARM + COUNTED + TIMED
WAITS = 2  # a step
PASSES = {"full": 3, "lora": 2}  # of a forward's FLOPs in a step: a frozen weight has no gradient
TEXT_WIDTH = 128


def check(machine: Machine) -> Iterator[Row]:
    runs: list[tuple[str, Stage, str, Callable[..., Any]]] = [
        ("contrast", "contrastive", "full", contrast),
        ("SFT", "sft", "full", supervise),
        ("SFT with LoRA", "sft", "lora", supervise),
        ("DPO", "dpo", "full", prefer),
    ]
    for name, stage, kind, make in runs:
        try:
            yield from _measured(machine, name, stage, kind, make)
        except ModuleNotFoundError as error:
            yield Row("a training step", name, "–", f"needs {error.name}", "skipped")


def _measured(machine: Machine, name: str, stage: Stage, kind: str, make: Callable[..., Any]) -> Iterator[Row]:
    experiment = of(machine, kind)
    if machine.cuda:  # whose size is known to the memory model before anything is tried
        total = torch.cuda.get_device_properties(0).total_memory
        need = training_memory(experiment, stage)
        if need.peak > 0.95 * total:
            yield Row("a training step", name, "–", f"needs {need}, the card has {total / GIB:.0f} GiB", "skipped")
            return
    machine.free()
    trainer, batch = make(machine, experiment)
    flops = _forward_flops(machine, trainer, batch, stage)
    measured = Measured(machine)
    trainer.add_callback(measured)
    machine.free()
    trainer.train()
    seconds, (peak, of_what) = measured.seconds, machine.peak()
    share = PASSES[kind] * flops / seconds / peak
    scans = len(batch["chunk_mask"])
    yield told("a training step", f"{name}, {scans} scans: seconds", f"{seconds:.3f}", seconds)
    yield told("a training step", f"{name}: share of {of_what} (MFU)", f"{share:.1%}", share)
    yield _waits(machine, name, measured.waits)
    yield from _memory(machine, name, training_memory(experiment, stage).peak)
    del trainer, batch
    gc.collect()


def _waits(machine: Machine, name: str, waits: Synchronisations) -> Row:
    each, causes = waits.count / COUNTED, ", ".join(sorted(set(waits.causes)))
    said = f"{each:.2g} ({causes})" if causes else f"{each:.2g}"
    # a CPU only tells of what would wait; and on it the model checks its inputs
    verdict = "measured" if not machine.cuda else "ok" if each <= WAITS else "missed"
    return Row("a training step", f"{name}: waits for the device, a step", f"≤ {WAITS}", said, verdict, each)


def _memory(machine: Machine, name: str, model: int) -> Iterator[Row]:
    what = f"{name}: memory model, GiB"
    if not machine.cuda:
        yield told("memory model", what, f"{model / GIB:.3f}", model / GIB, aim="the device's peak ± 15 %")
        return
    peak = torch.cuda.max_memory_allocated()
    yield told("memory model", what, f"{model / GIB:.2f}", model / GIB)
    off = abs(model / peak - 1)
    yield within("memory model", f"{name}: its distance from the peak of {peak / GIB:.2f} GiB", off, 0.15)


class Measured(TrainerCallback):
    """What waits in the steps behind the first ones, then the seconds of others: to count costs time, to time waits."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.ends = machine, list[float]()
        self.waits = Synchronisations(machine.device)

    @property
    def seconds(self) -> float:
        """The least of a step's."""
        return min(end - start for start, end in itertools.pairwise(self.ends))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM:
            self.waits.__enter__()
        if state.global_step == WARM + COUNTED:
            self.waits.__exit__(None, None, None)
        if state.global_step >= WARM + COUNTED:
            self.machine.wait()
            self.ends.append(time.perf_counter())


def of(machine: Machine, kind: str) -> Experiment:
    """The preset `paper`, one worker's share of its batches; or the least there is."""
    if machine.small:
        stage = {"batch_size": 2, "precision": "bf16"}
        sections = {"contrastive": stage, "sft": stage, "dpo": stage}
        experiment = config.validate(merged(parity.experiment(small=True).model_dump(), sections))
    else:
        paper = config.load("paper")
        share = {stage: getattr(paper, stage).batch_size // getattr(paper, stage).workers for stage in STAGES}
        alone = [each for stage, n in share.items() for each in (f"{stage}.batch_size={n}", f"{stage}.workers=1")]
        experiment = config.load("paper", alone)
    lora = LoraSettings(r=4) if machine.small else LoraSettings()
    model = experiment.model.model_copy(update={"lora": lora if kind == "lora" else None})
    return experiment.model_copy(update={"model": model})


STAGES: tuple[Stage, ...] = ("contrastive", "sft", "dpo")


def arguments(machine: Machine, experiment: Experiment, stage: Stage) -> dict[str, Any]:
    return {
        **{"output_dir": str(machine.scratch), "max_steps": STEPS, "logging_steps": STEPS, "report_to": []},
        **{"save_strategy": "no", "remove_unused_columns": False, "disable_tqdm": True, "bf16": True},
        **{"use_cpu": not machine.cuda, "logging_nan_inf_filter": False, "ddp_find_unused_parameters": False},
        "activation_checkpointing": getattr(experiment, stage).gradient_checkpointing,
        "learning_rate": 1e-5,
    }


def language_model(machine: Machine, experiment: Experiment) -> Any:
    """With random weights in the shape of its backbone."""
    shape = configuration(experiment.model, experiment.data.spec, text_config(experiment.model), volume_token_id=1)
    with torch.device(machine.device):
        model = Mu2ForConditionalGeneration(shape)
    return add_lora(model, experiment.model.lora) if experiment.model.lora else model


def scans(experiment: Experiment, count: int) -> dict[str, Any]:
    spec = experiment.data.spec
    volumes = torch.randint(0, 256, (count, *spec.shape), dtype=torch.uint8)
    mask = torch.ones(count, spec.chunks, dtype=torch.bool)
    return {"case_ids": ["scan"] * count, "volumes": volumes, "chunk_mask": mask, "full_chunks": int(mask.sum())}


def texts(experiment: Experiment, rows: int, vocabulary: int) -> dict[str, Any]:
    """As long as the model takes: placeholders, then an answer."""
    queries, length = experiment.model.tokenizer.queries, experiment.model.max_text_tokens
    ids = torch.randint(2, vocabulary, (rows, queries + length))
    ids[:, :queries] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "right_padded": True}


def questions(rows: int) -> dict[str, Tensor]:
    return {
        "question_ids": torch.full((rows, QUESTION_TOKENS), 2),
        "question_mask": torch.ones(rows, QUESTION_TOKENS, dtype=torch.bool),
    }


def contrast(machine: Machine, experiment: Experiment) -> tuple[Any, dict[str, Any]]:
    settings = experiment.contrastive
    with torch.device(machine.device):
        model = build_contrastive(experiment.model, experiment.data.spec, settings, TEXT_WIDTH)
    count = settings.batch_size
    rows = count * TEXTS_PER_CASE
    batch = {
        **scans(experiment, count),
        "text_embeddings": torch.randn(rows, TEXT_WIDTH),
        "targets": torch.eye(count, dtype=torch.bool).repeat_interleave(TEXTS_PER_CASE, 0),
        "text_keys": torch.arange(rows),
    }
    given = TrainingArguments(**arguments(machine, experiment, "contrastive"))
    trainer = ContrastiveTrainer(model=model, args=given)
    trainer.batches = Same(batch, machine)
    return trainer, batch


def supervise(machine: Machine, experiment: Experiment) -> tuple[Any, dict[str, Any]]:
    model = language_model(machine, experiment)
    count = experiment.sft.batch_size
    batch = {**scans(experiment, count), **questions(count)}
    batch |= texts(experiment, count, model.config.text.vocab_size)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == 1, -100)
    trainer = SftTrainer(model=model, args=TrainingArguments(**arguments(machine, experiment, "sft")))
    trainer.batches = Same(batch, machine)
    return trainer, batch


def prefer(machine: Machine, experiment: Experiment) -> tuple[Any, dict[str, Any]]:
    import datasets
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig

    from mu2llm.stages.dpo_step import Mu2DPOTrainer, loss_arguments
    from mu2llm.weights import train_tokenizer

    model = language_model(machine, experiment)
    count = experiment.dpo.batch_size
    batch = {**scans(experiment, count), **questions(count), "tile_scans": True}
    batch |= texts(experiment, 2 * count, model.config.text.vocab_size)
    batch["completion_mask"] = (batch["input_ids"] != 1).long()
    batch |= {f"ref_{which}_logps": torch.zeros(count) for which in ("chosen", "rejected")}
    words: PreTrainedTokenizerFast = train_tokenizer(["a"], 300)
    trainer = Mu2DPOTrainer(
        model=model,
        args=DPOConfig(**arguments(machine, experiment, "dpo"), **loss_arguments(experiment.dpo)),
        train_dataset=datasets.Dataset.from_list([{"prompt": "", "chosen": "", "rejected": ""}]),
        processing_class=words,
        data_collator=lambda rows: rows,
    )
    trainer.batches = Same(batch, machine)
    return trainer, batch


class Same:
    """One batch for every step, in pinned memory where that is of use."""

    def __init__(self, batch: dict[str, Any], machine: Machine) -> None:
        pin = machine.cuda
        self.batch = {k: v.pin_memory() if pin and isinstance(v, Tensor) else v for k, v in batch.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (dict(self.batch) for _ in range(STEPS))


def _forward_flops(machine: Machine, trainer: Any, batch: dict[str, Any], stage: Stage) -> float:
    """Of one forward pass, counted on it."""
    keys = ("case_ids", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    inputs = {k: v.to(machine.device) if isinstance(v, Tensor) else v for k, v in batch.items() if k not in keys}
    model = trainer.accelerator.unwrap_model(trainer.model).train()
    counter = FlopCounterMode(display=False)
    with machine.autocast("bf16"), counter:  # with the graph, as checkpointing keeps it small
        model(**inputs, **({} if stage == "contrastive" else {"use_cache": False}))
    return float(counter.get_total_flops())

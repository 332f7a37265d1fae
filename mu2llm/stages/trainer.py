"""The trainer's side of a stage: HF's Trainer over our streams, reporting to Ray Train, saving what it learned."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from mu2llm import artefacts, private_apis, storage, tracking
from mu2llm.cases import Stream
from mu2llm.records import Checkpoint, Lineage, Training
from mu2llm.stages.job import FINISHED_FILE, STOPPED_FILE, Job
from mu2llm.stages.muon import MuonAndAdamW
from mu2llm.stages.worker import INTERMEDIATE_FILE, Batches, Resume, current_worker

_OF_THE_SCAN = ("volumes", "vision_features", "chunk_mask", "question_ids", "question_mask")


def train(
    trainer: Trainer,
    job: Job,
    resume: Resume,
    finish: Callable[[Any, str], dict[str, float]],
    restore: Callable[[str], Any],
) -> None:
    """Trains to the end, reporting and checkpointing on the way, and publishes the checkpoint.

    `finish(model, folder)` writes the final `save_pretrained` folder and returns the stage's own metrics; only rank 0
    calls it. With FSDP no rank has the whole model: `restore` makes it of what HF's trainer saves.
    """
    reports = _Reports(job, resume, trainer.batches.stream, trainer.prompt_hash)  # type: ignore[attr-defined]  # a Streamed one
    trainer.add_callback(reports)
    trainer.muon = job.settings.muon  # type: ignore[attr-defined]
    trainer.epochs_a_step = job.settings.batch_size * job.settings.accumulation / job.rows  # type: ignore[attr-defined]
    rank = current_worker.get().rank
    try:
        trainer.train(resume_from_checkpoint=resume.folder)
    except _NotFinite as error:
        # not raised on: the same batch would fail again on every retry
        storage.write_json(storage.join(job.state, STOPPED_FILE), {"why": str(error), "case_ids": error.cases})
        return
    with tempfile.TemporaryDirectory() as saved, tempfile.TemporaryDirectory() as folder:
        if job.settings.fsdp:
            trainer.save_model(saved)  # on every rank: each holds a part
        if rank == 0:
            model = restore(saved) if job.settings.fsdp else trainer.accelerator.unwrap_model(trainer.model)
            metrics = finish(model, folder)
            progress = reports.progress(trainer.state.global_step)
            weights = artefacts.upload(folder, job.out)
            # what describes it waits for `_publish`, on the driver, which makes the folder whole
            described = description(job, progress, resume.step, trainer.state, metrics, reports.prompt)
            described = artefacts.weighed(described, weights)
            storage.write_json(storage.join(job.state, FINISHED_FILE), described.model_dump(mode="json"))


def arguments(job: Job, folder: str, model: Any, **more: Any) -> dict[str, Any]:
    """The HF training arguments that all stages share, as keywords for `TrainingArguments` or `DPOConfig`."""
    settings, world = job.settings, current_worker.get().world
    return {
        "output_dir": folder,
        "max_steps": job.total_steps,
        "per_device_train_batch_size": settings.batch_size // world,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": settings.schedule,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        "use_cpu": settings.gpus_per_worker == 0,
        "seed": job.resolved.seed,
        "logging_steps": settings.log_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if settings.workers else "no",
        "save_steps": settings.save_steps,
        "ignore_data_skip": True,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "activation_checkpointing": settings.gradient_checkpointing,  # named, as trl's own default is on
        "torch_compile": settings.compile,
        "ddp_find_unused_parameters": False,
        **(sharding(settings.fsdp, model) if settings.fsdp else {}),
        **more,
    }


def sharding(strategy: str, model: Any) -> dict[str, Any]:
    """HF's arguments for FSDP: each layer's weights are gathered when it is reached, those of no layer at once."""
    layers = private_apis.layer_classes(model)
    return {
        "fsdp": True,
        "fsdp_config": {
            "reshard_after_forward": strategy == "full_shard",
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP" if layers else "NO_WRAP",
            "transformer_layer_cls_to_wrap": sorted(layers),
        },
    }


class Streamed:
    """Mixed into an HF Trainer: its batches come from `self.batches`, already this rank's, in order.

    A batch is a dict of tensors and the list `case_ids`, which names the cases when the loss is not finite.
    """

    batches: Batches
    first_scan: dict[str, torch.Tensor]
    epochs_a_step: float = 0.0
    prompt_hash: str = ""  # where the model reads prompts
    muon: float | None = None  # its learning rate

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.fsdp:  # type: ignore[attr-defined]
            private_apis.allow_fsdp_on_cpu()
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    def create_optimizer(self, model: Any = None) -> Any:
        new = self.optimizer is None  # type: ignore[attr-defined]
        optimiser = super().create_optimizer(model)  # type: ignore[misc]
        if new and self.muon:
            optimiser = self.optimizer = MuonAndAdamW.of(optimiser, model or self.model, self.muon)  # type: ignore[attr-defined]
        return optimiser

    def get_train_dataloader(self) -> Any:
        return self.batches

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        cases = inputs.pop("case_ids")
        self.first_scan = {name: value[:1] for name, value in inputs.items() if name in _OF_THE_SCAN}
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        finite = torch.isfinite(loss).float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not finite:
            raise _NotFinite.of_all(float(loss), cases)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the loss also how spread the visual tokens' selection is over the last batch's first scan."""
        self.state.epoch = self.state.global_step * self.epochs_a_step  # type: ignore[attr-defined]  # HF: of max_steps
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        if "loss" in logs and hasattr(model, "selection_metrics") and not self.args.fsdp:  # type: ignore[attr-defined]
            logs |= model.selection_metrics(**self._prepare_inputs(self.first_scan))  # type: ignore[attr-defined]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class _NotFinite(Exception):
    def __init__(self, cases: list[str], loss: float) -> None:
        super().__init__(f"the loss is {loss} on cases {', '.join(cases)}")
        self.cases = cases

    @classmethod
    def of_all(cls, loss: float, cases: list[str]) -> _NotFinite:
        """The same on every worker: the cases of those whose loss is not finite."""
        each = [(loss, cases)]
        if torch.distributed.is_initialized():
            each = each * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(each, (loss, cases))
        wrong = [(loss, cases) for loss, cases in each if not math.isfinite(loss)]
        return cls([case for _, cases in wrong for case in cases], wrong[0][0])


class _Reports(TrainerCallback):
    """HF Trainer → Ray Train: metrics at every log, a checkpoint at every save, one when a node is to go."""

    def __init__(self, job: Job, before: Resume, stream: Stream, prompt: str) -> None:
        self.job, self.before, self.stream, self.prompt = job, before, stream, prompt
        self.started = time.monotonic()
        self.saved_on_preemption = False
        self.save_seconds = 0.0

    def progress(self, step: int) -> dict[str, Any]:
        settings = self.job.settings
        rows = (step - self.before.step) * settings.batch_size * settings.accumulation
        return {
            "step": step,
            "seconds": round(self.before.seconds + time.monotonic() - self.started, 3),
            "cases_seen": self.before.cases_seen + rows,
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logged = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        progress = self.progress(state.global_step)
        steps = max(1, state.global_step - self.before.step)
        elapsed = time.monotonic() - self.started
        current_worker.get().report(
            {
                **logged,
                **progress,
                "samples_per_second": steps * self.job.settings.batch_size * self.job.settings.accumulation / elapsed,
                "workers": current_worker.get().world,
                "data_wait_share": self.stream.wait_seconds / elapsed,
                "upload_wait_share": self.save_seconds / elapsed,
                "seconds_left": elapsed / steps * (state.max_steps - state.global_step),
            }
        )

    def _validated(self, step: int) -> bool:
        every = self.job.validation.steps if self.job.validation else None
        return every is not None and step % every == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._validated(state.global_step):
            control.should_save = True
        if not self.saved_on_preemption and current_worker.get().preempted():
            control.should_save = self.saved_on_preemption = True

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if state.is_world_process_zero:
            progress = self.progress(state.global_step)
            described = description(self.job, progress, self.before.step, state, {}, self.prompt)
            (folder / INTERMEDIATE_FILE).write_text(json.dumps(described.model_dump(mode="json")))
        started, step = time.monotonic(), state.global_step
        metrics = {**self.progress(step), "saved_step": step}
        current_worker.get().report(metrics, folder, validate=step if self._validated(step) else None)
        self.save_seconds += time.monotonic() - started


def history(state: TrainerState) -> list[dict[str, float]]:
    """The numbers that the trainer logged, a dict for each time, over all resumes."""
    return [
        {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
        for entry in state.log_history
    ]


def description(
    job: Job, progress: dict[str, Any], resumed_from: int, state: TrainerState, metrics: dict[str, float], prompt: str
) -> Checkpoint:
    """What a checkpoint says of itself, between and at the end of the training alike."""
    logged = history(state)
    return Checkpoint(
        uri=job.out,
        experiment=job.experiment,
        lineage=Lineage(
            stage=job.stage,
            data=storage.lasting(job.data),
            data_checksum=job.data_checksum,
            spec_hash=job.spec_hash,
            prompt=prompt,
            parent=job.parent and storage.lasting(job.parent),
            judge=job.judge,
            seed=job.resolved.seed,
            git_commit=job.git_commit,
            run=job.run,
            versions=tracking.versions(),
            identity=job.identity.digest,
            inputs=job.identity.inputs,
        ),
        training=Training(
            steps=progress["step"],
            cases_seen=progress["cases_seen"],
            seconds=progress["seconds"],
            resumed_from_step=resumed_from,
            metrics={**dict(item for entry in logged for item in entry.items()), **metrics},
            history=[entry for entry in logged if "loss" in entry],
        ),
    )

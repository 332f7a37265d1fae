"""The trainer's side of a stage: HF's Trainer over our streams, reporting to Ray Train, saving what it learned."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from mu2llm import artefacts, private_apis, storage, tracking
from mu2llm.records import Checkpoint, Lineage, Training
from mu2llm.stages import tower
from mu2llm.stages.job import FINISHED_FILE, STOPPED_FILE, Job
from mu2llm.stages.steps import NotFinite
from mu2llm.stages.worker import INTERMEDIATE_FILE, Batches, Resume, current_worker

logger = logging.getLogger(__name__)


def train(
    trainer: Trainer,
    job: Job,
    resume: Resume,
    finish: Callable[[Any, str], dict[str, float]],
    restore: Callable[[str], Any],
    measure: Callable[[Any], dict[str, float]] | None = None,
) -> None:
    """Trains to the end, reporting and checkpointing on the way, and publishes the checkpoint.

    `finish(model, folder)` writes the final `save_pretrained` folder and returns the stage's own metrics; only rank 0
    calls it, and `measure` for what takes long, when the checkpoint is safe. With FSDP no rank has the whole model:
    `restore` makes it of what HF's trainer saves. What an earlier attempt finished is not trained again.
    """
    finished = storage.join(job.state, FINISHED_FILE)
    if storage.exists(finished):
        logger.warning("%s is trained already; what was cut off was measuring it, which is left out", job.out)
        current_worker.get().done()
        return
    reports = _Reports(job, resume, trainer)  # type: ignore[arg-type]  # a Streamed one
    trainer.add_callback(reports)
    trainer.rates = job.settings.learning_rates.model_dump(exclude_none=True)  # type: ignore[attr-defined]
    trainer.muon = job.settings.muon  # type: ignore[attr-defined]
    trainer.epochs_a_step = job.settings.batch_size * job.settings.accumulation / job.rows  # type: ignore[attr-defined]
    worker = current_worker.get()
    try:
        trainer.train(resume_from_checkpoint=resume.folder)
    except NotFinite as error:
        # not raised on: the same batch would fail again on every retry
        storage.write_json(storage.join(job.state, STOPPED_FILE), {"why": str(error), "case_ids": error.cases})
        worker.uploaded()
        return
    worker.uploaded()
    with tempfile.TemporaryDirectory() as saved, tempfile.TemporaryDirectory() as folder:
        if job.settings.fsdp:
            trainer.save_model(saved)  # on every rank: each holds a part
        if worker.rank == 0:
            model = restore(saved) if job.settings.fsdp else trainer.accelerator.unwrap_model(trainer.model)
            metrics = finish(model, folder)
            progress = reports.progress(trainer.state.global_step)
            weights = artefacts.upload(folder, job.out)
            # what describes it waits for `_publish`, on the driver, which makes the folder whole
            described = description(job, progress, resume.step, trainer.state, metrics, reports.prompt)
            described = artefacts.weighed(described, weights)
            storage.write_json(finished, described.model_dump(mode="json"))
            if measure:
                described.training.metrics.update(measure(model))
                storage.write_json(finished, described.model_dump(mode="json"))
    worker.done()


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
        "save_strategy": "steps" if settings.workers and settings.save_steps else "no",
        "save_steps": settings.save_steps or job.total_steps,
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


class _Reports(TrainerCallback):
    """HF Trainer → Ray Train: metrics at every log, a checkpoint at every save, one when a node is to go.

    All that needs a word of every worker or of the GPU is asked every `check_steps`, and before a save.
    """

    def __init__(self, job: Job, before: Resume, trainer: Any) -> None:
        self.job, self.before, self.trainer, self.prompt = job, before, trainer, trainer.prompt_hash
        self.started = self.saved = self.went_on = time.monotonic()
        self.saved_on_preemption = False
        self.save_seconds = self.report_seconds = 0.0

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
        batches: Batches = self.trainer.batches
        worker = current_worker.get()
        worker.report(
            {
                **logged,
                **progress,
                "samples_per_second": steps * self.job.settings.batch_size * self.job.settings.accumulation / elapsed,
                "workers": worker.world,
                "data_wait_share": batches.wait_seconds / elapsed,
                "sync_wait_share": (self.trainer.wait_seconds + self.report_seconds) / elapsed,
                "upload_wait_share": self.save_seconds / elapsed,
                "seconds_left": elapsed / steps * (state.max_steps - state.global_step),
            }
        )
        self.went_on = time.monotonic()
        self.report_seconds += self.went_on - self.started - elapsed

    def _validated(self, step: int) -> bool:
        every = self.job.validation.steps if self.job.validation else None
        return every is not None and step % every == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        asked = state.global_step % self.job.settings.check_steps == 0
        if self._validated(state.global_step):
            control.should_save = True
        if asked and not self.saved_on_preemption and current_worker.get().preempted():
            control.should_save = self.saved_on_preemption = True
        if asked or control.should_save:
            due = self.trainer.look(due=self._due())
            control.should_save = control.should_save or due
        self.went_on = time.monotonic()

    def _due(self) -> bool:
        """Whether the last save is `save_minutes` ago."""
        minutes = self.job.settings.save_minutes if self.job.settings.workers else None
        return minutes is not None and time.monotonic() - self.saved >= 60 * minutes

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if state.is_world_process_zero:
            progress = self.progress(state.global_step)
            described = description(self.job, progress, self.before.step, state, {}, self.prompt)
            (folder / INTERMEDIATE_FILE).write_text(json.dumps(described.model_dump(mode="json")))
        step = state.global_step
        metrics = {**self.progress(step), "saved_step": step}
        current_worker.get().report(metrics, folder, validate=step if self._validated(step) else None)
        self.saved = time.monotonic()
        self.save_seconds += self.saved - self.went_on  # written, and handed over to be uploaded


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
            tower=tower.licensed(job.resolved),
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

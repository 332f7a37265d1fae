"""The one place that knows Ray Train: a stage's loop on workers, resumable, with its checkpoint published.

A stage calls `run` on the driver with a `Job`; each worker calls the stage's `loop(job)`, which builds the
model and its HF `Trainer` and hands it to `train`. Everything a resume needs lies under `<out>.state/`;
when the stage is done, the checkpoint is published at `<out>` and the state goes.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ray
import ray.train
import ray.train.torch
import torch
from pydantic import BaseModel, Field
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from mu2llm import config, storage, tracking
from mu2llm.cases import Shards, Stream
from mu2llm.config import Experiment, StageConfig
from mu2llm.errors import Failure, UserError
from mu2llm.records import Checkpoint, Lineage, Training

Progress = Callable[[dict[str, float]], None]
_NOT_OF_THE_RESULT = {
    *("workers", "gpus_per_worker", "cpus_per_worker", "max_failures"),
    *("save_steps", "keep_checkpoints", "log_steps"),
}
PROGRESS_FILE = "mu2llm_progress.json"  # in every intermediate checkpoint: what is cumulative over resumes


class Job(BaseModel):
    """A stage as plain values that travel to the workers."""

    stage: Literal["contrastive", "sft", "dpo"]
    experiment: dict[str, Any]
    data: str
    data_checksum: str
    out: str
    parent: str | None = None
    parent_identity: str = ""
    spec_hash: str
    rows: int
    judge: str | None = None
    git_commit: str | None = None
    run: str = Field("", description="key of the stage's run in the tracking store")
    shards: str = Field("", description="dpo: URI of the shards that the pairs in `data` were made on")
    split: str = "train"
    reference: str | None = Field(None, description="dpo: URI of the reference's log-probabilities")
    features: str | None = Field(None, description="URI of the cached vision features that are read in place of voxels")

    @property
    def resolved(self) -> Experiment:
        return config.validate(self.experiment)

    @property
    def settings(self) -> StageConfig:
        return getattr(self.resolved, self.stage)

    @property
    def state(self) -> str:
        return f"{self.out.rstrip('/')}.state"

    @property
    def total_steps(self) -> int:
        """Optimiser steps: `max_steps`, or as many as the epochs hold whole batches (at least one)."""
        settings = self.settings
        return settings.max_steps or max(
            1, int(settings.epochs * self.rows / (settings.batch_size * settings.accumulation))
        )

    @property
    def identity(self) -> str:
        """Digest of all that decides the result: not of workers, progress or how often one saves."""
        settings = self.settings.model_dump(mode="json")
        for name in (
            "workers",
            "gpus_per_worker",
            "cpus_per_worker",
            "max_failures",
            "save_steps",
            "keep_checkpoints",
            "log_steps",
        ):
            settings.pop(name)
        parts = [self.stage, settings, self.experiment["model"], self.experiment["seed"]]
        return config.digest([*parts, self.data_checksum, self.parent_identity])


# glibc would give large freed tensors back and fault them in anew at every step: a fifth of a CPU step's time
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_ARENA_MAX": "1",
}


def job(
    stage: Literal["contrastive", "sft", "dpo"],
    shards: Shards,
    out: str,
    experiment: Experiment,
    parent: str | None = None,
    **more: Any,
) -> Job:
    """The job of a stage on the `train` split of shards; a UserError where the inputs do not fit together."""
    if shards.spec.hash != experiment.data.spec.hash:
        raise UserError(
            f"{shards.uri} has spec {shards.spec.name} ({shards.spec.hash}), preset {experiment.name} expects "
            f"{experiment.data.spec.name} ({experiment.data.spec.hash}): name the preset that it was ingested with"
        )
    if not shards.count("train"):
        raise UserError(f"{shards.uri} has no rows in split train; ingest more scans or change data.split")
    values = {
        "stage": stage,
        "experiment": experiment.model_dump(mode="json"),
        "data": shards.uri,
        "data_checksum": shards.checksum,
        "out": out,
        "parent": parent,
        "parent_identity": Checkpoint.open(parent).lineage.identity if parent else "",
        "spec_hash": shards.spec.hash,
        "rows": shards.count("train"),
        "git_commit": tracking.git_commit(),
    }
    return Job(**{**values, **more})


def finished(job: Job) -> Checkpoint | None:
    """The checkpoint at `out` if this very job made it; a UserError if another one did."""
    if not storage.exists(storage.join(job.out, Checkpoint.FILE)):
        return None
    checkpoint = Checkpoint.open(job.out)
    if checkpoint.lineage.identity != job.identity:
        raise UserError(
            f"{job.out} holds a {checkpoint.lineage.stage} checkpoint of another configuration or data; "
            "give another --out or delete it"
        )
    return checkpoint


def run(job: Job, loop: Callable[[Job, Resume], None], progress: Progress | None = None) -> Checkpoint:
    """Runs a stage to its end, from where an interrupted run of the same job left off.

    Raises UserError where the workers do not fit the cluster, Failure where training failed.
    """
    done = finished(job)
    if done:
        return done
    check_resources(job.settings)
    _drop_other_state(job)
    settings = job.settings
    filesystem, path = storage.resolve(job.state)
    tracked = _track(job)
    job = job.model_copy(update={"run": tracked.key})
    with tempfile.TemporaryDirectory() as folder, _relay(Path(folder) / "progress.jsonl", job.total_steps, progress):
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"job": job.model_dump(), "loop": loop},
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.workers,  # type: ignore[arg-type]  # (MIN, MAX): elastic
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker=_resources(settings),
            ),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the options of Train V1
                name="train",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints),
                callbacks=[_Reporter(str(Path(folder) / "progress.jsonl"), tracked)],  # type: ignore[list-item]
                worker_runtime_env={"env_vars": KEEP_FREED_MEMORY},
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            tracking.end_stage(tracked, {"why": _cause(error)}, "FAILED")
            raise Failure(f"{job.stage} failed: {_cause(error)}; what was trained is kept in {job.state}") from error
        except BaseException:
            tracking.end_stage(tracked, {}, "KILLED")
            raise
    stopped = storage.join(job.state, "stopped.json")
    if storage.exists(stopped):
        told = storage.read_json(stopped)
        tracking.end_stage(tracked, {"why": told["why"]}, "FAILED")
        if told.get("mistake"):
            raise UserError(told["why"])
        raise Failure(f"{job.stage} stopped: {told['why']}; see {stopped}")
    checkpoint = Checkpoint.open(job.out)
    storage.delete(job.state)
    tracking.end_stage(tracked, {"checkpoint": tracking.place(job.out)})
    return checkpoint


def _track(job: Job) -> tracking.StageRun:
    """The stage's run in the tracking store: a new one, or that of the interrupted run which this one goes on with."""
    path = storage.join(job.state, "run.json")
    key = storage.read_json(path)["key"] if storage.exists(path) else None
    of = {"data": storage.lasting(job.data), "data_checksum": job.data_checksum, "spec": job.spec_hash}
    parent = Checkpoint.open(job.parent) if job.parent else None
    tags = {
        **of,
        "parent": tracking.place(parent.uri) if parent else "",
        "parent_run": (parent.lineage.run or "") if parent else "",
        "judge": job.judge or "",
        "commit": job.git_commit or "",
        "out": tracking.place(job.out),
    }
    run = tracking.start_stage(job.stage, job.experiment, tags, key=key)
    storage.write_json(path, {"key": run.key})
    return run


def _run_here(
    job: Job, loop: Callable[[Job, Resume], None], tracked: tracking.StageRun, progress: Progress | None
) -> None:
    """Without workers this process trains: for debuggers, and for sweeps, whose processes stay warm between trials."""

    def told(numbers: dict[str, float]) -> None:
        tracked.log(numbers, step=int(numbers.get("step", 0)))
        if progress:
            progress({**numbers, "total": job.total_steps})

    token = _here.set(_Here(told))
    try:
        _worker({"job": job.model_dump(), "loop": loop})
    except BaseException as error:  # also the SystemExit by which Ray Tune stops a trial
        tracking.end_stage(tracked, {}, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    finally:
        _here.reset(token)


def _run_on_workers(
    job: Job, loop: Callable[[Job, Resume], None], tracked: tracking.StageRun, progress: Progress | None
) -> None:
    settings = job.settings
    filesystem, path = storage.resolve(job.state)
    with tempfile.TemporaryDirectory() as folder, _relay(Path(folder) / "progress.jsonl", job.total_steps, progress):
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"job": job.model_dump(), "loop": loop},
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.workers,  # type: ignore[arg-type]  # (MIN, MAX): elastic
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker=_resources(settings),
            ),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the options of Train V1
                name="train",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints),
                callbacks=[_Reporter(str(Path(folder) / "progress.jsonl"), tracked)],  # type: ignore[list-item]
                worker_runtime_env={"env_vars": KEEP_FREED_MEMORY},
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            tracking.end_stage(tracked, {}, "FAILED")
            raise Failure(f"{job.stage} failed: {_cause(error)}; what was trained is kept in {job.state}") from error


def check_resources(settings: StageConfig) -> None:
    """A UserError where the least number of workers can never fit the cluster as it is."""
    least, most = (settings.workers, settings.workers) if isinstance(settings.workers, int) else settings.workers
    for workers in range(least, most + 1):
        if settings.batch_size % workers:
            raise UserError(f"batch_size {settings.batch_size} is global: it does not divide among {workers} workers")
    have = ray.cluster_resources()
    for name, each in _resources(settings).items():
        if least * each > have.get(name, 0):
            raise UserError(
                f"{least} workers of {each:g} {name} need {least * each:g}; the cluster has {have.get(name, 0):g}: "
                "ask for fewer workers or join a larger cluster"
            )


def _resources(settings: StageConfig) -> dict[str, float]:
    resources = {"CPU": settings.cpus_per_worker}
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    return resources


def _drop_other_state(job: Job) -> None:
    """What an interrupted run left is used if it was this job, and goes if it was another."""
    marker = storage.join(job.state, "identity.json")
    if storage.exists(marker) and storage.read_json(marker)["identity"] == job.identity:
        storage.delete(storage.join(job.state, "stopped.json"))
        return
    if storage.exists(job.state):
        storage.delete(job.state)
    storage.write_json(marker, {"identity": job.identity, "stage": job.stage})


def _cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    last = str(next(iter(failures.values())) if failures else error).strip().splitlines()
    return last[-1] if last else type(error).__name__


# ---- controller → driver: one line a report


class _Reporter(ray.train.UserCallback):
    """Runs on the controller: every report goes to the tracking store and to the driver's progress line."""

    def __init__(self, path: str, run: tracking.StageRun) -> None:
        self.path, self.run = path, run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        numbers = {name: value for name, value in metrics[0].items() if isinstance(value, int | float)}
        with open(self.path, "a") as stream:
            stream.write(json.dumps(numbers) + "\n")
        self.run.log(numbers, step=int(numbers.get("step", 0)))


@contextlib.contextmanager
def _relay(path: Path, total: int, progress: Progress | None) -> Iterator[None]:
    """Follows the reporter's file and passes each line on to `progress`, while a stage runs."""
    path.touch()
    stop = threading.Event()

    def follow() -> None:
        with path.open() as stream:
            while not stop.wait(0.2):
                for line in stream:
                    if progress:
                        progress({**json.loads(line), "total": total})

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5)


# ---- on the workers


def _worker(settings: dict[str, Any]) -> None:
    job = Job.model_validate(settings["job"])
    torch.set_num_threads(max(1, int(job.settings.cpus_per_worker)))
    set_seed(job.resolved.seed)
    try:
        settings["loop"](job, Resume.point())
    except UserError as error:
        # not raised on: a retry would end the same way
        storage.write_json(storage.join(job.state, "stopped.json"), {"why": str(error), "mistake": True})


def arguments(job: Job, folder: str, **more: Any) -> dict[str, Any]:
    """The HF training arguments that all stages share, as keywords for `TrainingArguments` or `DPOConfig`."""
    settings, world = job.settings, ray.train.get_context().get_world_size()
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
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "ignore_data_skip": True,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "torch_compile": settings.compile,
        "fsdp": settings.fsdp or "",
        "ddp_find_unused_parameters": False,
        **more,
    }


class Streamed:
    """Mixed into an HF Trainer: its batches come from `self.batches`, already this rank's, in order.

    A batch is a dict of tensors and the list `case_ids`, which names the cases when the loss is not finite.
    """

    batches: Batches

    def get_train_dataloader(self) -> Any:
        return self.batches

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        cases = inputs.pop("case_ids")
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        finite = torch.isfinite(loss).float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not finite:
            raise _NotFinite(cases, float(loss))
        return loss


class _NotFinite(Exception):
    def __init__(self, cases: list[str], loss: float) -> None:
        super().__init__(f"the loss is {loss} on cases {', '.join(cases)}")
        self.cases = cases


class Resume(BaseModel):
    """Where to go on: the last intermediate checkpoint's folder, if there is one, and what was done up to it."""

    folder: str | None = None
    step: int = 0
    seconds: float = 0.0
    cases_seen: int = 0

    @classmethod
    def point(cls) -> Resume:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return cls()
        folder = checkpoint.to_directory(tempfile.mkdtemp(prefix="mu2llm-resume-"))
        return cls(folder=folder, **json.loads((Path(folder) / PROGRESS_FILE).read_text()))


class Batches:
    """What a worker trains on: its share of the stream from where it is to go on, collated."""

    def __init__(
        self,
        job: Job,
        resume: Resume,
        shards: Shards,
        columns: list[str],
        collate: Callable[[Any], dict[str, Any]],
        **more: Any,
    ) -> None:
        context, settings = ray.train.get_context(), job.settings
        rows_a_step = settings.batch_size * settings.accumulation
        self.collate = collate
        self.stream = Stream(
            shards,
            job.split,
            columns,
            batch_size=settings.batch_size,
            seed=job.resolved.seed,
            rank=context.get_world_rank(),
            world=context.get_world_size(),
            start_row=resume.step * rows_a_step,
            rows=job.total_steps * rows_a_step,
            shuffle_rows=job.resolved.data.shuffle_rows,
            **more,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.collate, self.stream)


def train(trainer: Trainer, job: Job, resume: Resume, finish: Callable[[str], dict[str, float]]) -> None:
    """Trains to the end, reporting and checkpointing on the way, and publishes the checkpoint.

    `finish(folder)` writes the final `save_pretrained` folder and returns the stage's own metrics; only rank 0
    calls it.
    """
    reports = _Reports(job, resume, trainer.batches.stream)  # type: ignore[attr-defined]  # a Streamed one
    trainer.add_callback(reports)
    rank = ray.train.get_context().get_world_rank()
    try:
        trainer.train(resume_from_checkpoint=resume.folder)
    except _NotFinite as error:
        # not raised on: the same batch would fail again on every retry
        storage.write_json(storage.join(job.state, "stopped.json"), {"why": str(error), "case_ids": error.cases})
        return
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            metrics = finish(folder)
            progress = reports.progress(trainer.state.global_step)
            _publish(job, folder, progress, resume.step, history(trainer), metrics)


def history(trainer: Trainer) -> list[dict[str, float]]:
    """The numbers that the trainer logged, a dict for each time, over all resumes."""
    return [
        {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
        for entry in trainer.state.log_history
    ]


def _publish(
    job: Job,
    folder: str,
    progress: dict[str, Any],
    resumed_from: int,
    logged: list[dict[str, float]],
    metrics: dict[str, float],
) -> None:
    Checkpoint(
        uri=job.out,
        experiment=job.experiment,
        lineage=Lineage(
            stage=job.stage,
            data=storage.lasting(job.data),
            data_checksum=job.data_checksum,
            spec_hash=job.spec_hash,
            parent=job.parent and storage.lasting(job.parent),
            judge=job.judge,
            seed=job.resolved.seed,
            git_commit=job.git_commit,
            run=job.run,
            versions=tracking.versions(),
            identity=job.identity,
        ),
        training=Training(
            steps=progress["step"],
            cases_seen=progress["cases_seen"],
            seconds=progress["seconds"],
            resumed_from_step=resumed_from,
            metrics={**dict(item for entry in logged for item in entry.items()), **metrics},
            history=[entry for entry in logged if "loss" in entry],
        ),
    ).publish(folder)


class _Reports(TrainerCallback):
    """HF Trainer → Ray Train: metrics at every log, a checkpoint at every save, one when a node is to go."""

    def __init__(self, job: Job, before: Resume, stream: Stream) -> None:
        self.job, self.before, self.stream = job, before, stream
        self.started = time.monotonic()
        self.logged: dict[str, float] = {}
        self.saved_on_preemption = False

    def progress(self, step: int) -> dict[str, Any]:
        settings = self.job.settings
        rows = (step - self.before.step) * settings.batch_size * settings.accumulation
        return {
            "step": step,
            "seconds": round(self.before.seconds + time.monotonic() - self.started, 3),
            "cases_seen": self.before.cases_seen + rows,
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.logged = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        progress = self.progress(state.global_step)
        steps = max(1, state.global_step - self.before.step)
        elapsed = time.monotonic() - self.started
        ray.train.report(
            {
                **self.logged,
                **progress,
                "samples_per_second": steps * self.job.settings.batch_size * self.job.settings.accumulation / elapsed,
                "data_wait_share": self.stream.wait_seconds / elapsed,
                "seconds_left": elapsed / steps * (state.max_steps - state.global_step),
            }
        )
        if not self.saved_on_preemption and ray.train.get_preemption_info() is not None:
            control.should_save = self.saved_on_preemption = True

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if state.is_world_process_zero:
            (folder / PROGRESS_FILE).write_text(json.dumps(self.progress(state.global_step)))
        ray.train.report(
            {**self.logged, **self.progress(state.global_step)},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

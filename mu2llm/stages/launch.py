"""A stage from its start to its published checkpoint, on Ray Train's workers or in this process; resumable.

A stage calls `run` on the driver with a `Job`; each worker calls the stage's `loop(job, resume)`, which builds the
model and its HF `Trainer` and hands it to `trainer.train`. Everything a resume needs lies under `<out>.state/`; when
the stage is done, the checkpoint is published at `<out>` and the state goes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

from mu2llm import artefacts, logs, storage, telemetry, tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.errors import Failure, UserError
from mu2llm.progress import Counted, Logged, polled
from mu2llm.records import Checkpoint
from mu2llm.stages.held_out import HeldOut
from mu2llm.stages.job import FINISHED_FILE, SCORE, STOPPED_FILE, Job, finished
from mu2llm.stages.placement import check, resources
from mu2llm.stages.worker import (
    WARNINGS,
    InProcessWorker,
    Resume,
    current_worker,
    use_gpu,
    work,
    work_on_ray,
)

logger = logging.getLogger(__name__)
LISTEN_S = 0.2  # between two looks of the controller at its workers: until it looks, the next report has to wait
RELAY_S = 0.2  # between two looks of the driver at what the controller has written
SNAPSHOT_FILE = "train/checkpoint_manager_snapshot.json"  # Ray Train's, below the state
KEPT_SNAPSHOT_FILE = "snapshot.json"  # in the state: the last whole one
# glibc would give large freed tensors back and fault them in anew at every step: a fifth of a CPU step's time
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_ARENA_MAX": "1",
}


def run(
    job: Job, loop: Callable[[Job, Resume], None], progress: Logged | None = None, held_out: HeldOut | None = None
) -> Checkpoint:
    """Runs a stage to its end, from where an interrupted run of the same job left off.

    `held_out` validates its intermediate checkpoints where the job asks for it.

    Raises UserError where the workers do not fit the cluster, Failure where training failed.
    """
    done = finished(job)
    if done:
        return done
    check(job)
    if job.fresh:
        if job.settings.gpus_per_worker:
            _try_gpu(job)
        _clear(job)
    artefacts.claim(job.state, job.identity, f"an interrupted {job.stage}")
    storage.delete(storage.join(job.state, STOPPED_FILE))
    settings = job.settings
    tracked = _track(job)
    job = job.model_copy(update={"run": tracked.key})
    with logs.about(stage=job.stage, run=tracked.key):
        if settings.workers == 0:
            _run_here(job, loop, tracked, progress)
        else:
            _run_on_workers(job, loop, tracked, progress, held_out if job.validation else None)
    stopped = storage.join(job.state, STOPPED_FILE)
    if storage.exists(stopped):
        told = storage.read_json(stopped)
        tracking.end_stage(tracked, {"why": told["why"]}, "FAILED")
        if told.get("mistake"):
            raise UserError(told["why"])
        raise Failure(f"{job.stage} stopped: {told['why']}; see {stopped}")
    checkpoint = _publish(job, held_out if job.validation else None)
    storage.delete(job.state)
    tracking.end_stage(tracked, {"checkpoint": tracking.place(job.out)})
    return checkpoint


def _track(job: Job) -> tracking.StageRun:
    """The stage's run in the tracking store: a new one, or that of the interrupted run which this one goes on with."""
    path = storage.join(job.state, "run.json")
    key = storage.read_json(path)["key"] if storage.exists(path) else None
    of = {"data": storage.lasting(job.data), "data_checksum": job.data_checksum, "spec": job.spec_hash}
    parent = open_checkpoint(job.parent) if job.parent else None
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
    job: Job, loop: Callable[[Job, Resume], None], tracked: tracking.StageRun, progress: Logged | None
) -> None:
    """Without workers this process trains: for debuggers, and for sweeps, whose processes stay warm between trials."""

    def told(numbers: dict[str, float]) -> None:
        _observe(job, tracked, numbers)
        if progress:
            progress({**numbers, "total": job.total_steps})

    token = current_worker.set(InProcessWorker(told))
    try:
        work({"job": job.model_dump(), "loop": loop})
    except BaseException as error:  # also the SystemExit by which Ray Tune stops a trial
        tracking.end_stage(tracked, {}, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    finally:
        current_worker.reset(token)


def _run_on_workers(
    job: Job,
    loop: Callable[[Job, Resume], None],
    tracked: tracking.StageRun,
    progress: Logged | None,
    held_out: HeldOut | None,
) -> None:
    settings = job.settings
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(LISTEN_S))
    filesystem, path = storage.resolve(job.state)
    score: dict[str, Any] = {"checkpoint_score_attribute": SCORE} if held_out else {}

    def measured(numbers: dict[str, float]) -> None:
        tracked.log(numbers, step=int(numbers["step"]))

    followed = held_out.followed(job, measured) if held_out else contextlib.nullcontext()
    with (
        tempfile.TemporaryDirectory() as folder,
        _relay(Path(folder) / "progress.jsonl", job.total_steps, progress),
        followed,
    ):
        trainer = ray.train.torch.TorchTrainer(
            work_on_ray,
            train_loop_config={"job": job.model_dump(), "loop": loop},
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.workers,  # type: ignore[arg-type]  # (MIN, MAX): elastic
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker=resources(settings),
            ),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the options of Train V1
                name="train",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints, **score),
                callbacks=[_Reporter(str(Path(folder) / "progress.jsonl"), tracked, job)],  # type: ignore[list-item]
                worker_runtime_env={"env_vars": KEEP_FREED_MEMORY},
            ),
            validation_config=held_out.tasks(job) if held_out else None,  # type: ignore[call-arg]
        )
        _mend_snapshot(job)
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            if storage.exists(storage.join(job.state, STOPPED_FILE)):
                return  # one worker has said why, the others waited for it
            tracking.end_stage(tracked, {"why": _cause(error)}, "FAILED")
            raise Failure(f"{job.stage} failed: {_cause(error)}; what was trained is kept in {job.state}") from error
        except BaseException:
            tracking.end_stage(tracked, {}, "KILLED")
            raise


def _publish(job: Job, held_out: HeldOut | None) -> Checkpoint:
    """The checkpoint that the workers finished, with what was measured beside them."""
    checkpoint = Checkpoint(uri=job.out, **storage.read_json(storage.join(job.state, FINISHED_FILE)))
    if held_out:
        numbers = held_out.results(job)
        best = held_out.publish_best(job) if held_out.settings.publish == "best" else None
        chosen = best[0] if best else None
        checkpoint = artefacts.weighed(checkpoint, best[1]) if best else checkpoint
        last = next((each for each in numbers if each["step"] == chosen), numbers[-1] if numbers else {})
        metrics = checkpoint.training.metrics | {f"validation/{k}" if k == "step" else k: v for k, v in last.items()}
        training = checkpoint.training.model_copy(update={"validation": numbers, "metrics": metrics})
        checkpoint = checkpoint.model_copy(update={"training": training})
    artefacts.describe(checkpoint)
    return checkpoint


def _try_gpu(job: Job) -> None:
    """A UserError where the stage could not start on a worker's GPU: asked before anything is removed for it."""
    if job.settings.workers == 0:
        return use_gpu(job)
    settings = job.settings
    asked = ray.remote(num_cpus=settings.cpus_per_worker, num_gpus=settings.gpus_per_worker)(_why_not)
    why = ray.get(asked.remote(job.model_dump()))
    if why:
        raise UserError(why)
    return None


def _why_not(job: dict[str, Any]) -> str:
    try:
        use_gpu(Job.model_validate(job))
    except UserError as error:
        return str(error)
    return ""


def _clear(job: Job) -> None:
    """Removes the checkpoint at `out`, finished or not, as `--fresh` asks; a UserError where other things lie there."""
    if storage.exists(storage.join(job.out, Checkpoint.FILE)):
        tracking.release(job.out)
    elif storage.exists(job.out) and not storage.exists(job.state):
        raise UserError(f"{job.out} holds no checkpoint, and --fresh removes nothing else; give another --out")
    artefacts.discard(job.out)
    storage.delete(job.state)


def _mend_snapshot(job: Job) -> None:
    """Puts back Ray Train's list of checkpoints where a kill left half of it: Ray writes it in place."""
    uri = storage.join(job.state, SNAPSHOT_FILE)
    if not storage.exists(uri) or _is_json(storage.read_bytes(uri)):
        return
    kept = storage.join(job.state, KEPT_SNAPSHOT_FILE)
    if storage.exists(kept):
        storage.write_bytes(uri, storage.read_bytes(kept))
    else:
        logger.warning("%s: its list of checkpoints is broken; %s starts anew", job.state, job.stage)
        storage.delete(storage.parent(uri))


def _keep_snapshot(job: Job) -> None:
    uri = storage.join(job.state, SNAPSHOT_FILE)
    data = storage.read_bytes(uri) if storage.exists(uri) else b""
    if _is_json(data):
        storage.write_bytes(storage.join(job.state, KEPT_SNAPSHOT_FILE), data)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    last = str(next(iter(failures.values())) if failures else error).strip().splitlines()
    return last[-1] if last else type(error).__name__


class _Reporter(ray.train.UserCallback):
    """Runs on the controller: every report goes to the tracking store, to operators, to the driver's progress line."""

    def __init__(self, path: str, run: tracking.StageRun, job: Job) -> None:
        self.path, self.run, self.job = path, run, job

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with open(self.path, "a") as stream:
            for text in dict.fromkeys(text for each in metrics for text in each.get(WARNINGS, ())):
                stream.write(json.dumps({WARNINGS: text}) + "\n")
        numbers = {name: value for name, value in metrics[0].items() if isinstance(value, int | float)}
        if not numbers:
            return
        with open(self.path, "a") as stream:
            stream.write(json.dumps(numbers) + "\n")
        _observe(self.job, self.run, numbers)
        if checkpoint is not None:
            _keep_snapshot(self.job)


def _observe(job: Job, run: tracking.StageRun, numbers: dict[str, float]) -> None:
    """A report → the tracking store and operators; one that comes with a checkpoint is not measured."""
    if "saved_step" not in numbers:
        run.log(numbers, step=int(numbers.get("step", 0)))
        telemetry.trained(job.stage, run.key, {**numbers, "total": job.total_steps})


@contextlib.contextmanager
def _relay(path: Path, total: int, progress: Logged | None) -> Iterator[None]:
    """Follows the reporter's file while a stage runs: numbers go to `progress`, workers' warnings into our own log."""
    path.touch()
    with path.open() as stream:

        def look() -> None:
            for line in stream:
                told = json.loads(line)
                if WARNINGS in told:
                    logger.warning("%s", told[WARNINGS])
                elif progress:
                    progress({**told, "total": total})

        with polled(look, RELAY_S):
            yield


def scan_by_scan(progress: Logged | None) -> Counted | None:
    """Tells of scans that are encoded before a stage trains, as of steps."""
    return None if progress is None else lambda done, total: progress({"step": done, "total": total})

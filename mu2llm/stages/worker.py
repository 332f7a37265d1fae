"""One training worker: where it stands among the others, what it trains on, and where it goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import ray.train
import torch
from pydantic import BaseModel
from transformers import set_seed

from mu2llm import logs, storage
from mu2llm.cases import Shards, Stream
from mu2llm.ct import augment_batch
from mu2llm.errors import UserError
from mu2llm.memory import USABLE
from mu2llm.model.memory import check_memory
from mu2llm.progress import Logged
from mu2llm.records import Training
from mu2llm.stages.job import STOPPED_FILE, Job
from mu2llm.stages.read_ahead import pinned, read_ahead

# in every intermediate checkpoint: its description, by which a resume goes on. Not named as a whole checkpoint's is,
# which others would take such a folder for: its weights may be an adapter's alone
INTERMEDIATE_FILE = "mu2llm_intermediate.json"
WARNINGS = "warnings"  # in a report, beside its numbers


def work(settings: dict[str, Any]) -> None:
    """The stage's loop in this process, from where it is to go on; what the user must change stops the stage."""
    job = Job.model_validate(settings["job"])
    torch.set_num_threads(max(1, int(job.settings.cpus_per_worker)))
    set_seed(job.resolved.seed)
    try:
        if job.settings.gpus_per_worker:
            use_gpu(job)
        with logs.about(stage=job.stage, run=job.run or ""):
            settings["loop"](job, Resume.point())
    except UserError as error:
        # not raised on: a retry would end the same way
        storage.write_json(storage.join(job.state, STOPPED_FILE), {"why": str(error), "mistake": True})


def work_on_ray(settings: dict[str, Any]) -> None:
    """The same as a Ray worker's whole task: its lines of log are of the form that the driver's have."""
    logs.begin()
    with warnings.collected():
        work(settings)


def use_gpu(job: Job) -> None:
    """A UserError where a GPU is asked for and none is seen, or what the stage keeps does not fit it."""
    if not torch.cuda.is_available():
        raise UserError(
            f"{job.stage}.gpus_per_worker is {job.settings.gpus_per_worker:g} and the worker sees no GPU: set it to 0, "
            "or train where there is one"
        )
    torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked for, as in inference
    memory = torch.cuda.get_device_properties(0).total_memory
    check_memory(job.resolved, job.stage, int(memory * USABLE * min(1, job.settings.gpus_per_worker)))


class Warnings(logging.Handler):
    """What a Ray worker warns of, until its next report takes it to the driver: nobody sees the worker's own stderr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())
        if logging.lastResort:  # which passes over a record that has a handler
            logging.lastResort.handle(record)

    def take(self) -> list[str]:
        texts, self._texts = self._texts, []
        return texts

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        ours = logging.getLogger("mu2llm")
        ours.addHandler(self)
        try:
            yield
        finally:
            ours.removeHandler(self)


warnings = Warnings()


class RayTrainWorker:
    """Where a worker stands among others, and how it reports: Ray Train's."""

    @property
    def rank(self) -> int:
        return int(ray.train.get_context().get_world_rank())

    @property
    def world(self) -> int:
        return int(ray.train.get_context().get_world_size())

    def report(self, metrics: dict[str, Any], folder: Path | None = None, validate: int | None = None) -> None:
        """Metrics, with a folder an intermediate checkpoint; `validate` is its step if it is to be validated."""
        # numbers alone too: a report that is not asynchronous waits until the checkpoint before it is uploaded
        ray.train.report(  # type: ignore[call-arg]  # mypy sees the options of Train V1
            {**metrics, WARNINGS: warnings.take()},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if folder else None,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            validation=ray.train.ValidationTaskConfig(fn_kwargs={"step": validate}) if validate else False,
        )

    def uploaded(self) -> None:
        """Waits until all that was reported is where a resume finds it; every rank calls it.

        Before its folder goes: Ray Train uploads from there, and a worker whose upload fails is started anew.
        """
        self.done()

    def done(self) -> None:
        """What was warned of since the last report goes to the driver; every rank calls it."""
        ray.train.report({WARNINGS: warnings.take()})

    def preempted(self) -> bool:
        return ray.train.get_preemption_info() is not None

    def checkpoint(self) -> str | None:
        """The last intermediate checkpoint as a local folder."""
        checkpoint = ray.train.get_checkpoint()
        return checkpoint.to_directory(tempfile.mkdtemp(prefix="mu2llm-resume-")) if checkpoint else None


class InProcessWorker(RayTrainWorker):
    """The same where the process itself trains: alone, and anew from its start."""

    rank, world = 0, 1  # type: ignore[assignment]

    def __init__(self, told: Logged) -> None:
        self.told = told

    def report(self, metrics: dict[str, Any], folder: Path | None = None, validate: int | None = None) -> None:
        self.told({name: value for name, value in metrics.items() if isinstance(value, int | float)})

    def uploaded(self) -> None:
        """It saves nothing on the way."""

    def done(self) -> None:
        """Its warnings are seen where it logs them."""

    def preempted(self) -> bool:
        return False

    def checkpoint(self) -> str | None:
        return None


current_worker: ContextVar[RayTrainWorker] = ContextVar("current_worker", default=RayTrainWorker())  # noqa: B039  it has no state


class Resume(BaseModel):
    """Where to go on: the last intermediate checkpoint's folder, if there is one, and what was done up to it."""

    folder: str | None = None
    step: int = 0
    seconds: float = 0.0
    cases_seen: int = 0

    @classmethod
    def point(cls) -> Resume:
        folder = current_worker.get().checkpoint()
        if folder is None:
            return cls()
        done = Training.model_validate(json.loads((Path(folder) / INTERMEDIATE_FILE).read_text())["training"])
        return cls(folder=folder, step=done.steps, seconds=done.seconds, cases_seen=done.cases_seen)


class Batches:
    """What a worker trains on: its share of the stream from where it is to go on, collated in a thread of its own.

    `wait_seconds` is how long the training waited for it. `collate` shares no tokenizer with the training: one of
    transformers' fast ones does not bear two threads.
    """

    wait_seconds = 0.0

    def __init__(
        self,
        job: Job,
        resume: Resume,
        shards: Shards,
        columns: list[str],
        collate: Callable[[Any], dict[str, Any]],
        **more: Any,
    ) -> None:
        worker, settings = current_worker.get(), job.settings
        rows_a_step = settings.batch_size * settings.accumulation
        self.collate, self.seed, self.augment = collate, job.resolved.seed, getattr(settings, "augment", False)
        self.stream = Stream(
            shards,
            job.split,
            columns,
            batch_size=settings.batch_size,
            seed=job.resolved.seed,
            rank=worker.rank,
            world=worker.world,
            start_row=resume.step * rows_a_step,
            rows=job.total_steps * rows_a_step,
            shuffle_rows=job.resolved.data.shuffle_rows,
            **more,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return read_ahead(self._made, self._waited)

    def _made(self) -> Iterator[dict[str, Any]]:
        rows = map(self._augmented, self.stream) if self.augment else self.stream
        return (pinned(self.collate(each)) for each in rows)

    def _waited(self, seconds: float) -> None:
        self.wait_seconds += seconds

    def _augmented(self, rows: dict[str, Any]) -> dict[str, Any]:
        return {**rows, "voxels": augment_batch(rows["voxels"], rows["row"], self.seed)}

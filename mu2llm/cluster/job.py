"""What each file in `ray_jobs` does around its one function: options, checks before work, progress, exit codes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from importlib import import_module
from typing import Annotated, Any

import typer

from mu2llm import config, logs, tracking
from mu2llm.cluster import doctor
from mu2llm.cluster.session import session
from mu2llm.config import Experiment
from mu2llm.errors import UserError, explain
from mu2llm.progress import Counted, Logged, counted, logged, numbers_text

PROGRESS_EVERY_S = 2
CLIENT = "MU2LLM_CLIENT"
"""In a job's environment: the versions of packages where it was submitted, as JSON."""

_runs = ContextVar("runs", default=False)


def _located(uri: str) -> str:
    """A name in the registry becomes a URI where the job runs; where it is only checked, there is another registry."""
    return tracking.locate(uri) if _runs.get() else uri


Preset = Annotated[str, typer.Option("--preset", help="Name of a preset or path of a YAML file.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as dpo.beta=0.2.")]
Out = Annotated[str, typer.Option("--out", help="Where to write: s3://, gs://, or a file system that all nodes share.")]
Data = Annotated[str, typer.Option("--data", help="URI of the shards that `ingest` wrote; for dpo, of the pairs.")]
Init = Annotated[str, typer.Option("--init", parser=_located, help="Checkpoint to start from.")]
OptionalInit = Annotated[str | None, typer.Option("--init", parser=_located, help="Checkpoint to start from.")]
CheckpointUri = Annotated[
    str, typer.Option("--checkpoint", parser=_located, help="URI of a checkpoint; registry://mu2llm@champion.")
]
Manifest = Annotated[str, typer.Option("--manifest", help="URI of the table of cases.")]
Volumes = Annotated[str, typer.Option("--volumes", help="Root of the manifest's relative paths.")]
Format = Annotated[str, typer.Option("--format", help="jsonl, csv, parquet, ct-rate, amos-mm, abdomenatlas3, m3d-cap")]


Fresh = Annotated[bool, typer.Option("--fresh", help="Remove what this job made at --out before, and start over.")]


class Lines:
    """Progress as lines of a log, a few seconds apart: `[sft] 12/60 loss 1.2 samples/s 3`."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def __call__(self, step: str, done: float, total: float, numbers: dict[str, float]) -> None:
        now = time.monotonic()
        if done < total and now - self.last.get(step, -PROGRESS_EVERY_S) < PROGRESS_EVERY_S:
            return
        self.last[step] = now
        text = f"[{step}] {done:.0f}/{total:.0f} {numbers_text(numbers)}".rstrip()
        print(logs.line(text, {**numbers, "stage": step, "done": done, "total": total}), flush=True)

    def counting(self, step: str) -> Counted:
        return counted(self, step)

    def training(self, step: str) -> Logged:
        return logged(self, step)


@contextlib.contextmanager
def started(
    job: str, preset: str, overrides: list[str], reads: Sequence[str | None], writes: Sequence[str]
) -> Iterator[tuple[Experiment, Lines]]:
    """The resolved experiment and the progress of a job, on the cluster that runs it, once nothing is in its way.

    Raises UserError where versions, resources or rights to storage would make it fail later.
    """
    experiment = config.load(preset, overrides)
    logs.begin()
    with logs.about(job=job), session():
        checks = [*_client_versions(), *doctor.examine(experiment, job, [uri for uri in reads if uri], writes)]
        for check in checks:
            if check.status == "warn":
                text = f"warning: {check.name}: {check.found}; {check.mend}"
                print(logs.line(text, {"level": "WARNING", "message": text}), flush=True)
        doctor.refuse(checks)
        yield experiment, Lines()


def training(stage: str) -> Callable[..., None]:
    """The job that trains one stage: contrastive, sft or dpo."""

    def main(
        data: Data,
        out: Out,
        init: OptionalInit = None,
        fresh: Fresh = False,
        preset: Preset = "demo",
        set_: Set = [],  # noqa: B006
    ) -> None:
        module: Any = import_module(f"mu2llm.stages.{stage}")
        with started(stage, preset, set_, reads=[data, init], writes=[out]) as (experiment, lines):
            checkpoint = module.run(data, out, experiment, init, lines.training(stage), fresh=fresh)
            show({"checkpoint": out, **checkpoint.training.model_dump(exclude={"history"})})

    return main


def versions() -> dict[str, str]:
    """What is compared between client and cluster. mu2llm's own code is sent along."""
    return {name: importlib.metadata.version(name) for name in ("ray", "torch", "transformers", "trl")}


def _client_versions() -> list[doctor.Check]:
    """The client resolved the configuration: another Ray there is refused, other libraries are said."""
    there, here = json.loads(os.environ.get(CLIENT, "{}")), versions()
    other = {name: version for name, version in there.items() if version != here.get(name)}
    if not other:
        return []
    found = ", ".join(f"{name} {version} at the client, {here.get(name)} here" for name, version in other.items())
    mend = "install on the client what the image has (constraints.txt), or build the image from the client's checkout"
    return [doctor.Check(name="versions", status="fail" if "ray" in other else "warn", found=found, mend=mend)]


def show(result: Any) -> None:
    """A job's result: one JSON document, the last line of its log."""
    values = result.model_dump(mode="json") if hasattr(result, "model_dump") else result
    print(json.dumps(values, default=str), flush=True)


def run(main: Callable[..., None]) -> None:
    """Reads the options from the command line and runs `main`; what goes wrong becomes one line and an exit code."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    _runs.set(True)
    try:
        app(standalone_mode=False)
    except Exception as error:
        if os.environ.get("MU2LLM_DEBUG"):
            raise
        code, line = explain(error)
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(code)


def check_uri(name: str, uri: str) -> None:
    """A UserError where a job would write to a folder that only one node has."""
    if "://" not in uri and not os.path.isabs(uri):
        raise UserError(f"{name} {uri}: a job runs elsewhere; give s3://, gs:// or a shared folder's absolute path")

"""Jobs on a cluster, over its HTTP address: submit, follow, list, stop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import ray
import ray.exceptions
import requests
import typer.main
from pydantic import BaseModel
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes

from mu2llm import private_apis
from mu2llm.cluster import capacity, job, package
from mu2llm.cluster.session import TOKEN_FIX
from mu2llm.config import Experiment
from mu2llm.errors import Failure, UserError
from mu2llm.progress import SHOWN, Steps
from mu2llm.stages import placement

FOLDER = "ray_jobs"
MOST_NODES = 10_000  # Ray lists no more
PROGRESS = re.compile(r"^\[(?P<step>[\w ]+)\] (?P<done>\d+)/(?P<total>\d+)(?P<numbers>.*)$")
NODE_GROUP = "ray.io/node-group"  # of nodes that KubeRay or the cluster launcher started
POLL_S = 1.0
GONE_S = 60
Echo = Callable[[str], None]


class Entry(BaseModel):
    """A line of `mu2llm jobs list`. Times are Unix seconds."""

    id: str
    name: str
    status: str
    started: float | None
    ended: float | None
    message: str | None

    @classmethod
    def of(cls, details: JobDetails) -> Entry:
        metadata = details.metadata or {}
        return cls(
            id=details.submission_id or details.job_id or "",
            name=metadata.get("job", details.entrypoint[:40]),
            status=details.status.value,
            started=details.start_time and details.start_time / 1000,
            ended=details.end_time and details.end_time / 1000,
            message=details.message,
        )


def connect(address: str | None) -> JobSubmissionClient:
    """The jobs API of a cluster. Raises UserError where there is none, it refuses the token, or runs another Ray."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise UserError("no cluster is named: give --address http://HEAD:8265 (or set RAY_API_SERVER_ADDRESS)")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: jobs are sent over HTTP; give the dashboard, such as http://HEAD:8265")
    private_apis.quiet_job_client()
    private_apis.use_token()
    with one_line_errors(address):
        with _alone():
            client = JobSubmissionClient(address)
        version = private_apis.ray_version(client)
    if _minor(version) != _minor(ray.__version__):
        raise UserError(
            f"the cluster at {address} runs Ray {version}, this machine {ray.__version__}: install the same here "
            f"(pip install 'ray=={version}'), or build the cluster's image from this checkout"
        )
    return client


@contextlib.contextmanager
def one_line_errors(address: str) -> Iterator[None]:
    """What Ray's client raises → one line with the fix."""
    try:
        yield
    except ray.exceptions.AuthenticationError as error:
        why = "asks for a token" if "required" in str(error) else "refused the token"
        raise UserError(f"the cluster at {address} {why}: {TOKEN_FIX}") from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise UserError(
            f"there is no Ray dashboard at {address}; check host and port (8265 by default), the tunnel or "
            "port-forward to it, and that the head was started with its dashboard"
        ) from error
    except RuntimeError as error:
        if "does not exist" in str(error):
            what = str(error).rpartition("code 404: ")[2].rstrip(".")
            raise UserError(f"{what} at {address}; see mu2llm jobs list") from error
        raise Failure(f"the cluster at {address}: {str(error).strip().splitlines()[0]}") from error


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without the variables that name a cluster: Ray's clients take them even over an address in the call."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


# ---- submit


def names(folder: Path) -> list[str]:
    """The jobs of a checkout."""
    return sorted(path.stem for path in (folder / FOLDER).glob("*.py"))


def options(folder: Path, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """A job's own options as it will read them; its mistakes are reported here, before anything is sent."""
    if name not in names(folder):
        there = ", ".join(names(folder))
        raise UserError(
            f"{name} is not a job; there are {there}"
            if there
            else f"{folder} has no folder {FOLDER}: run this in a checkout of mu2llm, or name one by --folder"
        )
    spec = importlib.util.spec_from_file_location(f"{FOLDER}.{name}", folder / FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer(add_completion=False)
    app.command()(module.main)
    context = typer.main.get_command(app).make_context(f"mu2llm submit {name}", list(arguments))
    for option in ("out", "data", "checkpoint", "manifest", "volumes", "init"):
        if isinstance(value := context.params.get(option), str):
            job.check_uri(f"--{option}", value)
    return dict(context.params)


def check_capacity(client: JobSubmissionClient, experiment: Experiment, name: str) -> None:
    """A UserError where the cluster is too small and cannot grow; the job asks again, with what it can grow to."""
    address = client.get_address()
    with one_line_errors(address), _alone():
        # filtered here: where Ray's own filter leaves out nodes that have died, it takes the rest for cut off
        known = list_nodes(address=address, detail=True, limit=MOST_NODES)
    nodes = [node for node in known if node.state == "ALIVE"]
    if not nodes or any(node.labels.get(NODE_GROUP) for node in nodes):
        return  # its nodes come and go by groups
    have = [node.resources_total for node in nodes]
    lacking = capacity.lacks(capacity.asks(experiment, name), lambda need: placement.room(have, need))
    if lacking:
        raise UserError(
            f"{name} with preset {experiment.name} does not fit {address}: {'; '.join(lacking)}; ask for fewer workers "
            f"(--set {name}.workers=1), no GPU (--set {name}.gpus_per_worker=0), or start more nodes"
        )


def submit(
    client: JobSubmissionClient,
    name: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Sequence[str] = (),
    driver_cpus: float = 0,
) -> str:
    """Sends the folder's code and starts `ray_jobs/<name>.py` there; the job's id."""
    variables = package.check_environment(environment)
    package.check_no_secret(arguments)
    with tempfile.TemporaryDirectory(prefix="mu2llm-submit-") as staged, one_line_errors(client.get_address()):
        package.pack(folder, Path(staged))
        return str(
            client.submit_job(
                entrypoint=f"python {FOLDER}/{name}.py {shlex.join(arguments)}".strip(),
                runtime_env={
                    "working_dir": staged,
                    "env_vars": {**variables, job.CLIENT: json.dumps(job.versions()), "PYTHONUNBUFFERED": "1"},
                },
                metadata={"job": name},
                entrypoint_num_cpus=driver_cpus or None,
            )
        )


# ---- follow


def follow(client: JobSubmissionClient, id: str, echo: Echo, show: Steps | None = None) -> JobDetails:
    """Passes a job's log on, line by line, until it has ended; progress lines go to `show`. A lost line is taken up."""
    # all of it in an event loop, which takes Ctrl-C itself: Python loses a KeyboardInterrupt raised in a finalizer
    return asyncio.run(_follow(client, id, _LogLines(echo, show)))


async def _follow(client: JobSubmissionClient, id: str, reader: _LogLines) -> JobDetails:
    with one_line_errors(client.get_address()):
        client.get_job_info(id)
    lost_at: float | None = None
    while True:
        reader.begin()
        try:
            async for text in client.tail_job_logs(id):
                reader.feed(text)
            details = client.get_job_info(id)
            lost_at = None
        except (RuntimeError, OSError, aiohttp.ClientError, requests.exceptions.RequestException) as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > GONE_S:
                raise Failure(
                    f"{client.get_address()} has not answered for {GONE_S} s; the job may run on: mu2llm jobs logs {id}"
                ) from error
        else:
            if details.status.is_terminal():
                reader.finish()
                return details
        await asyncio.sleep(POLL_S)


class _LogLines:
    """Cuts a log into lines; a log that begins anew after a lost connection is skipped up to where it was."""

    def __init__(self, echo: Echo, show: Steps | None) -> None:
        self.echo, self.show = echo, show
        self.seen, self.skip, self.rest = 0, 0, ""

    def begin(self) -> None:
        self.skip = self.seen

    def feed(self, text: str) -> None:
        old = min(self.skip, len(text))
        self.skip -= old
        fresh = text[old:]
        self.seen += len(fresh)
        *lines, self.rest = (self.rest + fresh).split("\n")
        for line in lines:
            self._line(line)

    def finish(self) -> None:
        if self.rest:
            self._line(self.rest)

    def _line(self, line: str) -> None:
        found = PROGRESS.match(line)
        if not found or not self.show:
            self.echo(line)
            return
        words = found["numbers"].split()
        pairs = zip(words[::2], words[1::2], strict=False)
        numbers = {SHOWN[key]: float(value) for key, value in pairs if key in SHOWN}
        self.show(found["step"], float(found["done"]), float(found["total"]), numbers)


def conclude(details: JobDetails) -> None:
    """Nothing where the job succeeded, else its last line as our own: UserError where it was the user's mistake."""
    if details.status == JobStatus.SUCCEEDED:
        return
    id = details.submission_id
    if details.status == JobStatus.STOPPED:
        raise Failure(f"job {id} was stopped; submit it again to go on where it was")
    lines = [line for line in (details.message or "").splitlines() if line.strip()]
    reason = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")
    why = f"job {id} failed: {reason or (lines or ['no message'])[-1]}"
    raise UserError(why) if details.driver_exit_code == 2 else Failure(why)


# ---- the rest


def entries(client: JobSubmissionClient) -> list[Entry]:
    """All jobs that were submitted, newest first."""
    with one_line_errors(client.get_address()):
        jobs = [details for details in client.list_jobs() if details.submission_id]
    return sorted((Entry.of(details) for details in jobs), key=lambda entry: -(entry.started or 0))


def stop(client: JobSubmissionClient, id: str, timeout_s: float = 60) -> str:
    """Stops a job and waits until it has; the status it ended with."""
    with one_line_errors(client.get_address()):
        client.stop_job(id)
        deadline = time.monotonic() + timeout_s
        while not (status := client.get_job_status(id)).is_terminal():
            if time.monotonic() > deadline:
                raise Failure(f"job {id} has not stopped after {timeout_s:g} s; see mu2llm jobs logs {id}")
            time.sleep(0.2)
    return str(status.value)


def logs(client: JobSubmissionClient, id: str) -> str:
    with one_line_errors(client.get_address()):
        return str(client.get_job_logs(id))

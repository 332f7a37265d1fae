"""Clusters: submit, jobs, doctor, capacity; clean."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mu2llm import config
from mu2llm.cli.app import (
    DryRun,
    Json,
    Preset,
    Set,
    app,
    console,
    progress_bars,
    result_alone_on_stdout,
    result_console,
)
from mu2llm.errors import Failure

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from mu2llm.cluster.doctor import Check

Cluster = Annotated[str | None, typer.Option("--address", help="http://HEAD:8265; default RAY_API_SERVER_ADDRESS.")]
Anywhere = Annotated[
    str | None, typer.Option("--address", help="http://HEAD:8265 or HOST:6379; default RAY_ADDRESS, else its own.")
]
Folder = Annotated[Path, typer.Option("--folder", help="The checkout whose code is sent.")]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="A file of ray_jobs, such as sft. Its own options follow.")],
    address: Cluster = None,
    preset: Annotated[str | None, typer.Option("--preset", help="A preset's name or file; default: the job's.")] = None,
    set_: Set = [],  # noqa: B006
    follow: Annotated[bool, typer.Option("--follow/--no-wait", help="Show the log until the job ends.")] = True,
    env: Annotated[list[str], typer.Option("--env", metavar="NAME=VALUE", help="Of the job; no secrets.")] = [],  # noqa: B006
    driver_cpus: Annotated[float, typer.Option(help="CPUs reserved for the job's own process.")] = 0,
    folder: Folder = Path("."),
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run a job on a cluster: sends this checkout's code, starts ray_jobs/JOB.py there and follows its log."""
    from mu2llm.cluster import package, submission

    preset = preset or ("sweep" if job.startswith("sweep") else "demo")
    experiment = config.load(preset, set_)
    arguments = ["--preset", preset, *(part for each in set_ for part in ("--set", each)), *context.args]
    submission.options(folder, job, arguments)
    client = submission.connect(address)
    submission.check_capacity(client, experiment, job)
    if dry:
        sent = package.files(folder)
        size = sum((folder / path).stat().st_size for path in sent)
        console.print(f"{client.get_address()}: {job} {' '.join(arguments)}; {len(sent)} files, {size / 2**20:.1f} MiB")
        return
    id = submission.submit(client, job, arguments, folder, env, driver_cpus)
    if not follow:
        console.print(f"{id} runs on {client.get_address()}", highlight=False)
        _print({"job": id, "address": client.get_address(), "status": "PENDING"}, as_json)
        return
    details = _followed(client, id)
    _print({"job": id, "address": client.get_address(), "status": details.status.value}, as_json)
    submission.conclude(details)


def _print(values: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(values) if as_json else values["job"])


def _followed(client: JobSubmissionClient, id: str) -> JobDetails:
    """The job at its end. Ctrl-C asks whether it is to stop; without a terminal it runs on."""
    from mu2llm.cluster import submission

    try:
        with progress_bars() as bars:
            console.print(f"{id} runs on {client.get_address()}", highlight=False)
            return submission.follow(client, id, _echo, bars)
    except KeyboardInterrupt:
        if sys.stdin.isatty() and typer.confirm(f"\nstop job {id}?", err=True):
            submission.stop(client, id)
            raise Failure(f"job {id} was stopped; submit it again to go on where it was") from None
        raise Failure(f"job {id} runs on; mu2llm jobs logs {id} follows it, mu2llm jobs stop {id} ends it") from None


def _echo(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


jobs_app = typer.Typer(no_args_is_help=True, help="Jobs on a cluster.")
app.add_typer(jobs_app, name="jobs")


@jobs_app.command("list")
def jobs_list(address: Cluster = None, as_json: Json = False) -> None:
    """All jobs of the cluster, newest first."""
    from mu2llm.cluster import submission

    entries = submission.entries(submission.connect(address))
    if as_json:
        print(json.dumps([entry.model_dump() for entry in entries]))
        return
    table = Table("id", "job", "status", "started", "seconds")
    for entry in entries:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.started)) if entry.started else ""
        seconds = f"{(entry.ended or time.time()) - entry.started:.0f}" if entry.started else ""
        table.add_row(entry.id, entry.name, entry.status, started, seconds)
    result_console().print(table)


@jobs_app.command("logs")
def jobs_logs(
    id: str,
    address: Cluster = None,
    follow: Annotated[bool, typer.Option("--follow/--no-wait", help="Go on until the job ends.")] = True,
) -> None:
    """The log of a job."""
    from mu2llm.cluster import submission

    client = submission.connect(address)
    if not follow:
        print(submission.logs(client, id), end="")
        return
    submission.conclude(submission.follow(client, id, print))


@jobs_app.command("stop")
def jobs_stop(id: str, address: Cluster = None, as_json: Json = False) -> None:
    """Stop a job; what it finished is kept."""
    from mu2llm.cluster import submission

    status = submission.stop(submission.connect(address), id)
    print(json.dumps({"job": id, "status": status}) if as_json else status)


@app.command()
def doctor(
    address: Anywhere = None,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    job: Annotated[str, typer.Option(help="What is to be run, such as sft.")] = "pipeline",
    reads: Annotated[list[str], typer.Option("--reads", metavar="URI", help="Must be readable; repeatable.")] = [],  # noqa: B006
    writes: Annotated[list[str], typer.Option("--writes", metavar="URI", help="Must be writable; repeatable.")] = [],  # noqa: B006
    folder: Folder = Path("."),
    as_json: Json = False,
) -> None:
    """What this machine or a cluster can run: checks, each with its fix. Exits 1 where one fails."""
    from mu2llm import cluster
    from mu2llm.cluster.doctor import examine

    experiment = config.load(preset, set_)
    if address and address.startswith("http"):
        checks = _examined_there(address, preset, set_, job, reads, writes, folder)
    else:
        with result_alone_on_stdout(), cluster.session(address):
            checks = examine(experiment, job, reads, writes)
    if as_json:
        failed = any(check.status == "fail" for check in checks)
        print(json.dumps({"ok": not failed, "checks": [check.model_dump() for check in checks]}))
    else:
        _show_checks(checks)
    failed_names = [check.name for check in checks if check.status == "fail"]
    if failed_names:
        raise Failure(f"{len(failed_names)} of {len(checks)} checks failed: {', '.join(failed_names)}")


def _examined_there(
    address: str, preset: str, set_: list[str], job: str, reads: list[str], writes: list[str], folder: Path
) -> list[Check]:
    """The same checks, made by a job on the cluster."""
    from mu2llm.cluster import submission
    from mu2llm.cluster.doctor import Check

    lists = {"--set": set_, "--reads": reads, "--writes": writes}
    arguments = ["--preset", preset, "--job", job]
    arguments += [part for option, values in lists.items() for value in values for part in (option, value)]
    submission.options(folder, "doctor", arguments)
    client = submission.connect(address)
    id = submission.submit(client, "doctor", arguments, folder)
    lines: list[str] = []
    submission.conclude(submission.follow(client, id, lines.append))
    found = next((line for line in reversed(lines) if line.startswith('{"checks"')), None)
    if found is None:
        raise Failure(f"job {id} gave no checks; see mu2llm jobs logs {id}")
    return [Check.model_validate(check) for check in json.loads(found)["checks"]]


def _show_checks(checks: Sequence[Check]) -> None:
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("check", "", "found", "fix")
    for check in checks:
        table.add_row(
            check.name, f"[{colours[check.status]}]{check.status}[/]", escape(check.found), escape(check.mend)
        )
    result_console().print(table)


@app.command()
def capacity(
    presets: Annotated[list[str] | None, typer.Argument(help="Presets; default all that a GPU is for.")] = None,
    header: Annotated[
        bool, typer.Option("--header", help="The line of a preset's file that says what it needs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Computed, not measured: memory by stage and cases an hour by preset and GPU, from the model itself."""
    from dataclasses import asdict

    from mu2llm.cluster import capacity as computed

    experiments = [config.load(preset) for preset in presets or ("paper", "llama3-1b", "qwen3-1.7b")]
    if header:
        print("\n".join(computed.header(experiment) for experiment in experiments))
        return
    table = computed.capacities(experiments)
    print(json.dumps([asdict(row) for row in table]) if as_json else computed.markdown(table))


@app.command()
def clean(
    root: Annotated[str, typer.Argument(help="Look below this URI.")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
    older_than: Annotated[float, typer.Option(help="Days; what was written to since then stays.")] = 1,
    as_json: Json = False,
) -> None:
    """List, and with --yes then remove, what nothing refers to: also what a pipeline made by an earlier configuration.

    Other checkpoints, and what the registry refers to, always stay.
    """
    from mu2llm import cleaning

    found = cleaning.find(root, older_than)
    size = sum(each.bytes for each in found)
    table = Table("what", "kind", "MiB", "days", "why")
    for each in found:
        table.add_row(
            Text(each.uri.removeprefix(root).lstrip("/") or "."),
            each.kind,
            f"{each.bytes / 2**20:.1f}",
            f"{each.age_days:.1f}",
            Text(each.why),
        )
    (console if as_json else result_console()).print(table)
    if yes:
        cleaning.remove(found)
    summary = (
        f"{len(found)} below {root}, {size / 2**20:.1f} MiB: {'removed' if yes else 'nothing removed; --yes does'}"
    )
    console.print(summary, highlight=False)
    if as_json:
        print(json.dumps({"found": [each.model_dump() for each in found], "bytes": size, "removed": yes}))

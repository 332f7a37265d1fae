"""The app, the options that commands share, and how results and progress are shown."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import mu2llm
from mu2llm import config, storage, tracking
from mu2llm.progress import Steps, numbers_text
from mu2llm.settings.green import NAMES as JUDGES

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=mu2llm.__doc__)
console = Console(stderr=True, markup=False)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be read, written and needed; do nothing.")]
Preset = Annotated[str, typer.Option("--preset", help="Name of a preset or path of a YAML file.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as dpo.beta=0.2.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to join; default RAY_ADDRESS, else one of its own.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove what this command made at --out before, and start over.")]
Out = Annotated[str, typer.Option("--out", help="Where to write: a local path, s3:// or gs://.")]


def checkpoint_place(uri: str) -> str:
    """A checkpoint's own URI, seen from where the command runs: Ray's workers stand in other folders."""
    return storage.absolute(tracking.locate(uri))


CheckpointUri = Annotated[
    str,
    typer.Option(
        "--checkpoint", parser=checkpoint_place, metavar="URI", help="A checkpoint; registry://mu2llm@champion."
    ),
]
Manifest = Annotated[str, typer.Option(help="The table of cases.")]
Series = Annotated[
    str | None,
    typer.Option(help="DICOM series to read, by instance UID or description; NAME#2: the second scan in it."),
]
Accept = Annotated[
    list[str],
    typer.Option(metavar="CODE", help="Reason codes to let in all the same, such as not_hu; a wrong one names them."),
]
Volumes = Annotated[str, typer.Option(help="Root of the manifest's relative paths.")]
Format = Annotated[
    str, typer.Option(help="jsonl, csv, parquet, ct-rate, amos-mm, abdomenatlas3, m3d-cap, flare26, lidc or idc")
]
Data = Annotated[
    str,
    typer.Option("--data", parser=storage.absolute, metavar="URI", help="URI of the shards that `ingest` wrote."),
]
JudgeName = Annotated[str | None, typer.Option("--judge", help=JUDGES)]


def load_with_judge(preset: str, set_: list[str], judge: str | None) -> config.Experiment:
    """The configuration, with the judge that `--judge` names."""
    return config.load(preset, [*set_, *([f"judge.name={judge}"] if judge else [])])


def result_console() -> Console:
    """For results. In a file or a pipe they are as wide as they need, and no number is cut off."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 180)


def show(value: Any, as_json: bool) -> None:
    """A result: as JSON on stdout, or as a table for people."""
    if as_json:
        print(json.dumps(value, default=str))
        return
    table = Table(show_header=False, box=None)
    for key, item in value.items():
        text = json.dumps(item, default=str) if isinstance(item, dict | list) else str(item)
        table.add_row(escape(str(key)), escape(text))
    result_console().print(table)


def print_scan(head: str, text: str, style: str | None = None) -> None:
    """A head, in bold, and a text below it on stdout, as they are written: `[left]` in them is no markup."""
    result_console().print(Text(head, style="bold"), Text(f"{text}\n", style=style or ""), sep="\n", soft_wrap=True)


def dry_run(experiment: config.Experiment, reads: list[str], writes: list[str], needs: str) -> NoReturn:
    """What `--dry-run` prints: the resolved configuration, inputs, outputs, resources; then the command ends."""
    plan = {"reads": reads, "writes": writes, "needs": needs, "config": experiment.model_dump(mode="json")}
    print(yaml.safe_dump(plan, sort_keys=False, allow_unicode=True))
    raise typer.Exit


@contextlib.contextmanager
def progress_bars() -> Iterator[Steps]:
    """A bar with time left for each step that reports itself as (step, done, of how many, numbers)."""
    columns = ("[bold]{task.description:<12}", "{task.fields[numbers]}")
    bars = Progress(
        TextColumn(columns[0]), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn(columns[1]), console=console,
    )  # fmt: skip
    tasks: dict[str, Any] = {}

    def show(step: str, done: float, total: float, numbers: dict[str, float]) -> None:
        if step not in tasks:
            tasks[step] = bars.add_task(step, total=total, numbers="")
        text = numbers_text(numbers)
        extra: dict[str, Any] = {"numbers": text} if text else {}
        bars.update(tasks[step], completed=done, total=total, **extra)

    with bars:
        yield show


@contextlib.contextmanager
def work_on_ray(address: str | None) -> Iterator[Steps]:
    """The cluster at `address`, joined, and progress bars."""
    from mu2llm import cluster

    with result_alone_on_stdout(), cluster.session(address), progress_bars() as bars:
        yield bars


def result_alone_on_stdout() -> contextlib.AbstractContextManager[Any]:
    """While work is done nothing gets to stdout: Ray prints there what its raylets say."""
    return contextlib.redirect_stdout(sys.stderr)

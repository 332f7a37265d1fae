"""The command line. A command is a few lines that call the package; its JSON goes to stdout and nothing else does.

Exit codes: 0 done, 1 a failure, 2 the user's mistake; one line says what is wrong and what to do. `--debug`
(or MU2LLM_DEBUG=1) shows the traceback instead.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

import mu2llm
from mu2llm import config
from mu2llm.errors import Failure, UserError
from mu2llm.records import Rejection

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=mu2llm.__doc__)
console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be read, written and needed; do nothing.")]
Preset = Annotated[str, typer.Option("--preset", help="Name of a preset or path of a YAML file.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as dpo.beta=0.2.")]
Address = Annotated[str | None, typer.Option("--address", help="Ray cluster to join; default RAY_ADDRESS, else one of its own.")]
Out = Annotated[str, typer.Option("--out", help="Where to write: a local path, s3:// or gs://.")]
Data = Annotated[str, typer.Option("--data", help="URI of the shards that `ingest` wrote.")]


def main() -> None:
    """The console script: runs the app and turns what went wrong into one line and an exit code."""
    debug = "--debug" in sys.argv or bool(os.environ.get("MU2LLM_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app(standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        code, line = explain(error)
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(code)
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is kept, run the same command again to go on", style="red")
        sys.exit(130)


def explain(error: BaseException) -> tuple[int, str]:
    """What went wrong → (exit code, one line)."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, Rejection):
        return 1, str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command again"
    if isinstance(error, Failure):
        return 1, str(error)
    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
        return 2, f"{error.format_message()}; see mu2llm --help"
    first = str(error).strip().splitlines() or [""]
    return 1, f"{type(error).__name__}: {first[0]} (--debug shows where)"


def show(value: Any, as_json: bool) -> None:
    """A result: as JSON on stdout, or as a table for people."""
    if as_json:
        print(json.dumps(value, default=str))
        return
    table = Table(show_header=False, box=None)
    for key, item in value.items():
        table.add_row(str(key), json.dumps(item, default=str) if isinstance(item, dict | list) else str(item))
    Console().print(table)


def dry_run(experiment: config.Experiment, reads: list[str], writes: list[str], needs: str) -> None:
    """What `--dry-run` prints: the resolved configuration, inputs, outputs, resources."""
    plan = {"reads": reads, "writes": writes, "needs": needs, "config": experiment.model_dump(mode="json")}
    print(yaml.safe_dump(plan, sort_keys=False, allow_unicode=True))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(mu2llm.__version__)
        raise typer.Exit


config_app = typer.Typer(no_args_is_help=True, help="The configuration.")
app.add_typer(config_app, name="config")


@config_app.command("show")
def config_show(preset: Preset = "demo", set_: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Print the resolved configuration."""
    values = config.load(preset, set_).model_dump(mode="json")
    print(json.dumps(values) if as_json else yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

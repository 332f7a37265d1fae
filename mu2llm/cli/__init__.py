"""The command line. A command is a few lines that call the package; its JSON goes to stdout and nothing else does.

Exit codes: 0 done, 1 a failure, 2 the user's mistake; one line says what is wrong and what to do. `--debug`
(or MU2LLM_DEBUG=1) shows the traceback instead.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import mu2llm
from mu2llm.cli import (  # noqa: F401  their commands
    cluster,
    exports,
    models,
    reports,
    scans,
    serving,
    stages,
    sweeps,
    towers,
    tracking,
    whole,
)
from mu2llm.cli.app import app, console, show
from mu2llm.errors import explain

__all__ = ["app", "explain", "main", "show"]


def main() -> None:
    """The console script: runs the app and turns what went wrong into one line and an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours say what is long; theirs, that weights load
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


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(mu2llm.__version__)
        raise typer.Exit
    if context.invoked_subcommand != "runs":
        tracking.send_waiting()

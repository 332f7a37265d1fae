"""The command line. A command is a few lines that call the package; its JSON goes to stdout and nothing else does.

Exit codes: 0 done, 1 a failure, 2 the user's mistake; one line says what is wrong and what to do. `--debug`
(or MU2LLM_DEBUG=1) shows the traceback instead.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

import mu2llm
from mu2llm.cli import models, reports, scans, stages, whole  # noqa: F401  their commands
from mu2llm.cli.app import app, console, show
from mu2llm.errors import Failure, UserError
from mu2llm.records import Rejection

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


def explain(error: BaseException) -> tuple[int, str]:
    """What went wrong → (exit code, one line); what a Ray task raised is told as if it had been raised here."""
    error = _reason(error)
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, Rejection):
        return 1, str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            1,
            f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command again",
        )
    if isinstance(error, Failure):
        return 1, str(error)
    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
        return 2, f"{error.format_message().rstrip('.')}; see mu2llm --help"
    first = str(error).strip().splitlines() or [""]
    return 1, f"{type(error).__name__}: {first[0]} (--debug shows where)"


def _reason(error: BaseException) -> BaseException:
    """The first error of ours in a chain of causes, else the deepest one where Ray wrapped it."""
    chain = [error]
    while (cause := getattr(chain[-1], "cause", None) or chain[-1].__cause__) and cause not in chain:
        chain.append(cause)
    # Ray's wrapper of an error is an instance of that error's class too
    told = [each for each in chain if not type(each).__module__.startswith("ray.")] or chain[-1:]
    ours = [each for each in told if isinstance(each, UserError | Failure | Rejection)]
    return ours[0] if ours else told[-1] if told[0] is not error else error


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(mu2llm.__version__)
        raise typer.Exit

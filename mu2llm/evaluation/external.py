"""Metrics of other programs, which need an environment of their own: RaTEScore, RadGraph, RadEval.

A command gets JSON lines of {"id", "reference", "prediction"} on stdin and gives JSON lines of {"id", "score"} on
stdout. It is run once for the reports and for what the floors and the ceiling are measured on, so that all stand in
one table; ids are opaque to it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mu2llm.errors import Failure, UserError
from mu2llm.evaluation.bootstrap import Statistic
from mu2llm.evaluation.results import TITLES
from mu2llm.evaluation.scoring import Texts

NAMED = 3  # ids that a message lists
_NAME = re.compile(r"[A-Za-z][\w.-]*")


@dataclass(frozen=True)
class Scores:
    """What a command gave: a statistic by run or floor, and of each what it gave no number for."""

    statistics: dict[str, Statistic]
    missing: dict[str, list[str]]


def parsed(given: Iterable[str]) -> dict[str, str]:
    """NAME=COMMAND → name and command; a UserError where it is none, or the name is taken."""
    found: dict[str, str] = {}
    for each in given:
        name, _, command = each.partition("=")
        if not _NAME.fullmatch(name) or not command.strip():
            raise UserError(
                f"--external {each!r}: give NAME=COMMAND, such as RaTEScore='/envs/rate/bin/python rate.py'"
            )
        if name in TITLES or name in found:
            raise UserError(f"--external {each!r}: {name} is the name of another metric; give another")
        found[name] = command
    return found


def measured(name: str, command: str, runs: Mapping[str, Texts]) -> Scores:
    """The scores of a command for the reports of every run and floor.

    Raises UserError where there is no such command, Failure where it fails, writes what is no JSON line of an id that
    it was given, or gives no number at all.
    """
    rows = [
        {"id": f"{run}/{case.id}", "reference": reference, "prediction": candidate}
        for run, texts in runs.items()
        for case, (reference, candidate) in zip(texts.cases, texts.pairs, strict=True)
    ]
    scores = _read(name, _run(name, command, rows), {row["id"] for row in rows})
    if not any(value is not None for value in scores.values()):
        raise Failure(f"--external {name}: the command gave no number for any of {len(rows)} reports")
    values = {run: [scores.get(f"{run}/{case.id}") for case in texts.cases] for run, texts in runs.items()}
    return Scores(
        {run: Statistic.mean(each) for run, each in values.items()},
        {
            run: [case.id for case, value in zip(runs[run].cases, each, strict=True) if value is None]
            for run, each in values.items()
        },
    )


def describe(missing: Mapping[str, list[str]], cases: int) -> list[str]:
    """What external metrics, by name, gave no number for."""
    some = {name: f"{', '.join(ids[:NAMED])}{' …' if len(ids) > NAMED else ''}" for name, ids in missing.items() if ids}
    return [f"{name}: no number for {len(missing[name])} of {cases} reports: {ids}" for name, ids in some.items()]


def _run(name: str, command: str, rows: list[dict[str, str]]) -> str:
    given = "".join(f"{json.dumps(row)}\n" for row in rows)
    try:
        done = subprocess.run(shlex.split(command), input=given, capture_output=True, text=True, check=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--external {name}: {command!r} cannot be run: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise Failure(f"--external {name}: {command!r} ended with {done.returncode}: {said[-1]}")
    return done.stdout


def _read(name: str, stdout: str, known: set[str]) -> dict[str, float | None]:
    """Id → score, None where it is no finite number."""
    found: dict[str, float | None] = {}
    for number, line in enumerate(stdout.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            identity, score = row["id"], row["score"]
        except (ValueError, TypeError, LookupError):
            raise Failure(
                f'--external {name}: line {number} of its stdout is not {{"id": …, "score": …}}: {line[:80]!r}'
            ) from None
        if identity not in known or identity in found:
            which = "came before" if identity in found else "was not given to it"
            raise Failure(f"--external {name}: line {number} of its stdout has an id that {which}: {identity!r}")
        is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        found[identity] = float(score) if is_number else None
    return found

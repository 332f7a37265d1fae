"""Log lines say what they are of: job, stage and run key; one JSON object each where MU2LLM_LOG=json.

Replicas of the service log through Ray Serve, which adds deployment, replica and request id, in JSON too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping

MODE = "MU2LLM_LOG"
_GENERATED_ID = re.compile(r"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}")
_names: dict[str, str] = {}  # of the process, not of a context: its threads log too


def as_json() -> bool:
    return os.environ.get(MODE, "").lower() == "json"


class Lines(logging.Formatter):
    """`2026-11-28 10:00:00 WARNING mu2llm.stages.trainer [stage=sft run=4f2c…] message`, or the same as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        told = super().format(record)  # with the traceback, where there is one
        time, level = self.formatTime(record), record.levelname
        if as_json():
            return json.dumps({"time": time, "level": level, "logger": record.name, **_names, "message": told})
        of = " ".join(f"{name}={value}" for name, value in _names.items())
        return f"{time} {level} {record.name} {f'[{of}] ' if of else ''}{told}"


def begin(**names: str) -> None:
    """Lines of this process that no other handler takes, which Python shows bare on stderr, are of this form now.

    `names` are what the process is for from now on: a Ray worker has one task or actor at a time.
    """
    _names.update(names)
    assert logging.lastResort is not None
    logging.lastResort.setFormatter(Lines())


@contextlib.contextmanager
def about(**names: str) -> Iterator[None]:
    """Meanwhile every line carries these names too."""
    before = dict(_names)
    _names.update({name: value for name, value in names.items() if value})
    try:
        yield
    finally:
        _names.clear()
        _names.update(before)


def line(text: str, values: Mapping[str, object]) -> str:
    """A line of a job's standard output: `text`, or JSON with the values."""
    return json.dumps({**_names, **values}, default=str) if as_json() else text


def is_generated_id(request: str) -> bool:
    """Whether a request's id is a UUID, as Ray Serve makes them, and not a text that a client chose."""
    return bool(_GENERATED_ID.fullmatch(request))


class _Withheld(logging.Filter):
    """Takes from a record what a client may have written itself: the path, and a request id that is no UUID."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.__dict__.pop("route", None)
        if not is_generated_id(str(record.__dict__.get("request_id", ""))):
            record.__dict__.pop("request_id", None)
        return True


def withhold() -> None:
    """In a replica: behind the filters by which Ray Serve adds a request's id and path to its records."""
    for handler in logging.getLogger("ray.serve").handlers:
        handler.addFilter(_Withheld())

"""A run a stage: its resolved configuration, its numbers by step, links to what it made, where it came from."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from mu2llm.tracking import sender
from mu2llm.tracking.client import load_mlflow, store
from mu2llm.tracking.spool import Spool, new_key

MAX_VALUE = 6000  # characters of a parameter: MLflow's own limit


class StageRun(BaseModel):
    """A tracked run, as plain values that travel to the process that logs: where its entries wait, and its key."""

    spool: str
    key: str

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs numbers at a step. It only writes to the local disk: no store can slow it."""
        now = int(time.time() * 1000)
        items = [[name, float(value), now, step] for name, value in metrics.items()]
        self._append({"kind": "metrics", "items": items})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Sets tags: lineage, and links to what lies in storage."""
        self._append({"kind": "tags", "tags": dict(tags)})

    def _append(self, entry: dict[str, Any]) -> None:
        Spool(self.spool).append(self.key, entry)


_parent: contextvars.ContextVar[StageRun | None] = contextvars.ContextVar("parent", default=None)


@contextlib.contextmanager
def under(parent: StageRun | None) -> Iterator[None]:
    """Runs that start within are children of this one: a sweep's trials, which call the stages as everyone does."""
    token = _parent.set(parent)
    try:
        yield
    finally:
        _parent.reset(token)


def start_stage(
    name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    parent: StageRun | None = None,
    key: str | None = None,
) -> StageRun:
    """Opens a run for a stage: its resolved configuration as parameters, its lineage as tags.

    `parent` makes it a child of another run (default: the one of `under`); `key` goes on with a run that was
    interrupted. Works the same where the store is down: what is tracked waits on the local disk.
    """
    load_mlflow()  # here, and not in the thread that sends while others import
    uri = store()
    parent = parent or _parent.get()
    run = StageRun(spool=str(Spool.of(uri).path), key=key or new_key())
    run._append(
        {
            "kind": "start",
            "name": name,
            "time": int(time.time() * 1000),
            "tags": {"stage": name, **tags},
            "parameters": {name: str(value)[:MAX_VALUE] for name, value in _flat(parameters).items()},
            "parent": parent.key if parent else None,
            "resumed": key is not None,
        }
    )
    sender.open_run(uri, run.spool, run.key)
    return run


def end_stage(run: StageRun, tags: Mapping[str, str], status: str = "FINISHED") -> None:
    """Closes a run with its last tags; `status` is FINISHED, FAILED or KILLED."""
    if tags:
        run.tag(tags)
    run._append({"kind": "end", "status": status, "time": int(time.time() * 1000)})
    sender.close_run(run.spool, run.key)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat

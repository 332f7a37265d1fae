"""What the store has: runs, their numbers, and the way that a checkpoint came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel

from mu2llm import storage
from mu2llm.artefacts import open_checkpoint
from mu2llm.errors import UserError
from mu2llm.records import Checkpoint
from mu2llm.tracking import registry
from mu2llm.tracking.client import EXPERIMENT, reachable, shown, store
from mu2llm.tracking.sender import KEY, deliver

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

STAGES = ("contrastive", "sft", "dpo")
"""Those that make a checkpoint; others are of one that is there."""
SHORT = 8
"""Digits of a run's id that people need."""


class Run(BaseModel):
    """A run as the store has it; `metrics` are the last values (None: not a finite number), `parent` is the id of the
    run that it is a part of."""

    id: str
    stage: str
    status: str
    started: int
    seconds: float | None
    parent: str | None
    tags: dict[str, str]
    parameters: dict[str, str]
    metrics: dict[str, float | None]

    @property
    def key(self) -> str:
        return self.tags.get(KEY, "")

    @property
    def checkpoint(self) -> str | None:
        return self.tags.get("checkpoint") or None


def runs(stage: str | None = None, limit: int | None = None) -> list[Run]:
    """The runs of a stage, or all, newest first. What waits to be sent is sent before."""
    return _search(f"tags.stage = '{stage}'" if stage else "", limit)


def tags(stage: str) -> list[dict[str, str]]:
    """The tags of all tracked runs of a stage, newest first."""
    return [run.tags for run in runs(stage)]


def find(name: str) -> Run:
    """The run with an id (its first digits suffice), or the newest that made a checkpoint, by the checkpoint's URI."""
    makers = _makers(place(registry.locate(name)))
    if makers:
        return makers[0]
    found = [run for run in runs() if run.id.startswith(name)] if name else []
    if not found:
        raise UserError(
            f"{shown(store())} has no run {name}: give a checkpoint's URI or an id's first digits (mu2llm runs list)"
        )
    if len(found) > 1:
        raise UserError(f"{name} begins the ids of {found[0].id}, {found[1].id} and others: give more digits")
    return found[0]


def id_of(key: str) -> str | None:
    """The id that the store gave to the run with a key; None where it has none."""
    found = _search(f"tags.`{KEY}` = '{key}'", 1) if key else []
    return found[0].id if found else None


def _makers(checkpoint: str) -> list[Run]:
    """The runs that wrote a checkpoint, newest first."""
    quoted = checkpoint.replace("'", "\\'")
    return [run for run in _search(f"tags.checkpoint = '{quoted}'") if run.stage in STAGES]


def history(run: Run, metric: str) -> list[tuple[int, float | None]]:
    """(step, value) of a metric, by step."""
    values = sorted(reachable().get_metric_history(run.id, metric), key=lambda each: (each.step, each.timestamp))
    return [(int(each.step), _finite(each.value)) for each in values]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def place(uri: str) -> str:
    """A checkpoint's URI as runs are tagged with it."""
    return storage.absolute(storage.lasting(uri))


class Ancestor(BaseModel):
    """One step of a lineage. `run` is None where the store does not have it and the checkpoint itself was read."""

    stage: str
    run: str | None = None
    checkpoint: str | None = None
    data: str | None = None
    data_checksum: str | None = None
    spec: str | None = None
    judge: str | None = None
    commit: str | None = None
    parent: str | None = None


def lineage(name: str) -> list[Ancestor]:
    """The way that a run or checkpoint came, from itself back to its first stage."""
    chain: list[Ancestor] = []
    here: Ancestor | None = _ancestor(find(name)) if not _is_checkpoint(name) else _of_checkpoint(registry.locate(name))
    while here:
        chain.append(here)
        known = {each.checkpoint for each in chain}
        here = _of_checkpoint(here.parent) if here.parent and here.parent not in known else None
    return chain


def _is_checkpoint(name: str) -> bool:
    return storage.exists(storage.join(registry.locate(name), Checkpoint.FILE))


def _of_checkpoint(uri: str) -> Ancestor:
    """By the store's run, else by what the checkpoint says of itself."""
    uri = place(uri)
    makers = _makers(uri)
    if makers:
        return _ancestor(makers[0])
    if not storage.exists(storage.join(uri, Checkpoint.FILE)):
        return Ancestor(stage="unknown: neither a run nor the checkpoint is there", checkpoint=uri)
    own = open_checkpoint(uri).lineage
    return Ancestor(
        stage=own.stage,
        checkpoint=uri,
        data=own.data,
        data_checksum=own.data_checksum,
        spec=own.spec_hash,
        judge=own.judge,
        commit=own.git_commit,
        parent=own.parent,
    )


def _ancestor(run: Run) -> Ancestor:
    fields = ("checkpoint", "data", "data_checksum", "spec", "judge", "commit", "parent")
    return Ancestor(stage=run.stage, run=run.id, **{field: run.tags.get(field) or None for field in fields})


def differences(chosen: Sequence[Run]) -> dict[str, list[str | None]]:
    """The parameters and lineage in which runs differ → the value of each."""
    values = [{**run.parameters, **{name: run.tags.get(name, "") for name in LINEAGE}} for run in chosen]
    names = dict.fromkeys(name for each in values for name in each)
    table = {name: [each.get(name) for each in values] for name in names}
    return {name: row for name, row in table.items() if len(set(row)) > 1}


LINEAGE = ("data", "data_checksum", "spec", "parent", "judge", "commit")


def _search(filter: str, limit: int | None = None) -> list[Run]:
    client = reachable()
    deliver(store())
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found: list[Run] = []
    token: str | None = ""
    while experiment and token is not None and (limit is None or len(found) < limit):
        page = client.search_runs(
            [experiment.experiment_id],
            filter,
            max_results=min(limit or 1000, 1000),
            order_by=["start_time DESC"],
            page_token=token or None,
        )
        found += [_run(each) for each in page]
        token = page.token or None
    return found[:limit]


def _run(found: MlflowRun) -> Run:
    info, values = found.info, dict(found.data.tags)
    return Run(
        id=info.run_id,
        stage=values.get("stage", info.run_name or ""),
        status=info.status,
        started=info.start_time,
        seconds=(info.end_time - info.start_time) / 1000 if info.end_time else None,
        parent=values.get("mlflow.parentRunId"),
        tags={name: value for name, value in values.items() if not name.startswith("mlflow.")},
        parameters=dict(found.data.params),
        metrics={name: _finite(value) for name, value in found.data.metrics.items()},
    )

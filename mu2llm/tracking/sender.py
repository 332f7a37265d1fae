"""Spool → tracking store: in order, and each entry once.

An entry may be sent a second time where a process died between sending it and marking it. MLflow makes that harmless:
a run is found again by its key, an equal metric (name, value, step, time) is one row, parameters and tags are set
anew. A store that does not answer ends the attempt at once; an entry that a working store refuses is set aside.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from mu2llm.tracking.client import EXPERIMENT, answers, client, is_server, shown
from mu2llm.tracking.client import store as store_uri
from mu2llm.tracking.spool import Spool, folder

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)
KEY = "mu2llm.run"
"""The tag with a run's key."""
FLUSH_S = {True: 10.0, False: 60.0}
"""How long the end of a run waits for a server (True) or a file (False) to have all of it."""
POLL_S, LONGEST_PAUSE_S = 0.5, 30.0
REFUSALS = (400, 404, 409)
PARAMETERS_A_REQUEST, METRICS_A_REQUEST = 100, 1000  # MLflow's own limits


class Delivery(BaseModel):
    """What an attempt came to: entries sent, still waiting, refused; `why` the first that waits could not be sent."""

    store: str
    sent: int = 0
    waiting: int = 0
    refused: int = 0
    why: str = ""


class _Unsent(Exception):
    """An entry waits on: the store is down, or would not begin its run."""

    def __init__(self, why: str, store_is_down: bool) -> None:
        super().__init__(why)
        self.store_is_down = store_is_down


def deliver(uri: str) -> Delivery:
    """Sends what waits for a store, as far as it answers; nothing where another process is at it."""
    spool = Spool.of(uri)
    delivery = Delivery(store=shown(uri))
    with spool.claimed() as claimed:
        if claimed and not answers(uri):
            delivery.why = f"{shown(uri)} does not answer"
        elif claimed:
            for key in spool.runs():
                try:
                    delivery.sent += _deliver_run(client(uri), spool, key)
                except _Unsent as error:
                    delivery.why = delivery.why or str(error)
                    if error.store_is_down:
                        break
    return delivery.model_copy(update={"waiting": spool.waiting(), "refused": len(spool.refused())})


def waiting() -> int:
    """How many entries wait for the store, as a look at the local disk says."""
    return Spool(folder(store_uri())).waiting()


def refused() -> list[dict[str, Any]]:
    """The entries that the store did not take, with `why`."""
    return Spool(folder(store_uri())).refused()


def _deliver_run(store: MlflowClient, spool: Spool, key: str) -> int:
    count, (place, run_id) = 0, spool.sent(key)
    while entries := spool.read(key):
        # metrics that follow each other go together
        for kind, group in itertools.groupby(entries, lambda pair: pair[0]["kind"] if pair[0] else "cut short"):
            members = list(group)
            run_id = _send(store, spool, key, run_id, kind, [entry for entry, _ in members if entry])
            place, count = members[-1][1], count + len(members)
            spool.mark(key, place, run_id)
    spool.retire(key)
    return count


def _send(store: MlflowClient, spool: Spool, key: str, run_id: str, kind: str, entries: list[dict[str, Any]]) -> str:
    """Sends entries of one kind; the id that the run has in the store."""
    from mlflow.exceptions import MlflowException

    try:
        if kind == "start":
            return _start(store, key, entries[0])
        run_id = run_id or _known(store, key) or ""
        if kind == "metrics":
            _log(store, run_id, [item for entry in entries for item in entry["items"]])
        elif kind == "tags":
            for entry in entries:
                _tag(store, run_id, entry["tags"])
        elif kind == "end":
            store.set_terminated(run_id, entries[-1]["status"], entries[-1]["time"])
    except MlflowException as error:
        why = str(error).splitlines()[0]
        refused = error.get_http_status_code() in REFUSALS
        if kind == "start" or not run_id or not refused or not _knows(store, run_id):
            raise _Unsent(why, store_is_down=not refused) from error
        if len(entries) == 1:
            spool.refuse(key, entries[0], why)
        else:
            for entry in entries:
                _send(store, spool, key, run_id, kind, [entry])
    return run_id


def _knows(store: MlflowClient, run_id: str) -> bool:
    """Whether the store is well and has the run: then what it did not take is itself at fault."""
    from mlflow.exceptions import MlflowException

    try:
        store.get_run(run_id)
    except MlflowException:
        return False
    return True


def _start(store: MlflowClient, key: str, entry: dict[str, Any]) -> str:
    from mlflow.entities import Param, RunTag
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    run_id = _known(store, key)
    if not run_id:
        parent = entry.get("parent") and _known(store, entry["parent"])
        own = {KEY: key, **({MLFLOW_PARENT_RUN_ID: parent} if parent else {})}
        run_id = store.create_run(
            _experiment(store), start_time=entry["time"], tags={**entry["tags"], **own}, run_name=entry["name"]
        ).info.run_id
    elif entry["resumed"]:  # its parameters are there; those of the resume may differ in workers, say
        store.log_batch(run_id, tags=[RunTag("resumed", str(entry["time"]))])
        store.update_run(run_id, status="RUNNING")
        return run_id
    parameters = [Param(name, value) for name, value in entry["parameters"].items()]
    for start in range(0, len(parameters), PARAMETERS_A_REQUEST):
        store.log_batch(run_id, params=parameters[start : start + PARAMETERS_A_REQUEST])
    _inputs(store, run_id, entry)
    return str(run_id)


def _inputs(store: MlflowClient, run_id: str, entry: dict[str, Any]) -> None:
    """The data of a run in MLflow's own place for it, by URI and checksum."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    uri, checksum = entry["tags"].get("data"), entry["tags"].get("data_checksum")
    if uri and checksum:
        source = json.dumps({"uri": uri})
        data = Dataset(name=uri[-500:], digest=checksum[:36], source_type="uri", source=source)
        store.log_inputs(run_id, [DatasetInput(data, [InputTag(MLFLOW_DATASET_CONTEXT, entry["name"])])])


def _log(store: MlflowClient, run_id: str, items: list[list[Any]]) -> None:
    from mlflow.entities import Metric

    metrics = [Metric(name, value, moment, step) for name, value, moment, step in items]
    for start in range(0, len(metrics), METRICS_A_REQUEST):
        store.log_batch(run_id, metrics=metrics[start : start + METRICS_A_REQUEST])


def _tag(store: MlflowClient, run_id: str, tags: dict[str, str]) -> None:
    from mlflow.entities import RunTag

    store.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])


def _known(store: MlflowClient, key: str) -> str | None:
    """The id of the run with a key, if the store has it."""
    found = store.search_runs([_experiment(store)], f"tags.`{KEY}` = '{key}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def _experiment(store: MlflowClient) -> str:
    from mlflow.exceptions import MlflowException

    found = store.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return str(store.create_experiment(EXPERIMENT))
        except MlflowException:  # somebody else was faster
            found = store.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    return str(found.experiment_id)


class Sender(threading.Thread):
    """Sends in the background while this process has runs open, ever more seldom while the store is down."""

    def __init__(self, uri: str) -> None:
        super().__init__(name="tracking", daemon=True)
        self.uri, self.spool = uri, Spool.of(uri)
        self.open: set[str] = set()
        self.stopped, self.warned = False, False
        self.pause = POLL_S
        self.wake = threading.Event()

    def run(self) -> None:
        while not self.stopped:
            if self.spool.waiting():
                self._attempt()
            self.wake.wait(self.pause)
            self.wake.clear()

    def _attempt(self) -> None:
        try:
            delivery = deliver(self.uri)
        except Exception as error:  # a thread's error would be lost; the entries are not
            delivery = Delivery(store=shown(self.uri), why=f"{type(error).__name__}: {error}")
        self.pause = min(2 * self.pause, LONGEST_PAUSE_S) if delivery.why else POLL_S
        if delivery.why and not self.warned:
            self.warned = True
            logger.warning(
                "tracking: %s; what is tracked waits in %s and is sent later (mu2llm runs sync)",
                delivery.why,
                self.spool.path,
            )

    def flush(self) -> None:
        """Waits, within bounds, until the store has everything or is known to be down."""
        until = time.monotonic() + FLUSH_S[is_server(self.uri)]
        self.wake.set()
        while self.is_alive() and time.monotonic() < until and self.spool.waiting():
            if self.warned and self.pause > POLL_S:
                return
            time.sleep(0.02)


_senders: dict[str, Sender] = {}
"""Those of this process, by the folder of their spool."""


def open_run(uri: str, spool: str, key: str) -> None:
    """A run has begun here: from now on a thread sends what is tracked."""
    if spool not in _senders or not _senders[spool].is_alive():
        _senders[spool] = Sender(uri)
        _senders[spool].start()
    _senders[spool].open.add(key)


def close_run(spool: str, key: str) -> None:
    """A run has ended here: waits for the store to have it, and stops the thread with the last open run."""
    sender = _senders[spool]
    sender.flush()
    sender.open.discard(key)
    if not sender.open:
        sender.stopped = True
        sender.wake.set()
        sender.join(POLL_S)

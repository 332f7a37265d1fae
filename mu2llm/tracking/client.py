"""Which tracking store, and how to reach it without ever waiting long."""

from __future__ import annotations

import functools
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from mu2llm.errors import Failure

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT, MODEL = "mu2llm", "mu2llm"
SQLITE, ESCAPED = "sqlite:///", "sqlite+pysqlite:///"
REQUEST_S, CONNECT_S = 10, 2
"""Longest waits for an answer and for a connection; MLflow's own default is 120 s, eight times over."""


def store() -> str:
    """The tracking store: `MLFLOW_TRACKING_URI`, else SQLite at `mu2llm.db` in the working directory."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mu2llm.db"
    if not uri.startswith(SQLITE):
        return uri
    path = uri.removeprefix(SQLITE)
    if path.startswith("/"):
        return f"{SQLITE}{Path(path).resolve()}"
    # “?” and “%” of a folder are no query and no escapes. MLflow makes the folders of what begins with sqlite:/// as
    # they are written there, escapes and all
    folder = quote(str(Path.cwd()))
    return f"{SQLITE if folder == str(Path.cwd()) else ESCAPED}{folder}/{path}"


def shown(uri: str) -> str:
    """A store as it may be printed and recorded: without user and password."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


@functools.cache
def client(uri: str) -> MlflowClient:
    """MLflow's client of a store; nothing is asked of a server yet."""
    load_mlflow()
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def load_mlflow() -> None:
    """Imports MLflow with its waits bounded: seconds of imports, so only where something is tracked."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # stdout is for a command's own result
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow.tracking  # noqa: F401


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def answers(uri: str) -> bool:
    """Whether a connection to the store's server can be made at all; a file needs none, a proxy is left to MLflow."""
    parts = urlsplit(uri)
    if not is_server(uri) or (parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")):
        return True
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True


def reachable() -> MlflowClient:
    """The client of the store, for a command that cannot do without it; a Failure where nobody answers."""
    uri = store()
    if not answers(uri):
        raise Failure(
            f"the tracking server {shown(uri)} does not answer; start it, or unset MLFLOW_TRACKING_URI to use "
            "mu2llm.db in the working directory"
        )
    return client(uri)

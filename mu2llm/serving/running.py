"""The service on a Ray that is there: started, watched, drained."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

from ray import serve
from ray.serve import RunTarget
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus

from mu2llm import private_apis
from mu2llm.errors import Failure, UserError
from mu2llm.serving import rollouts
from mu2llm.serving.app import NAME, Settings, application, log_lines
from mu2llm.serving.keys import list_keys
from mu2llm.serving.traces import sender, tracing

LOOK_S = 1.0


def check(settings: Settings, host: str, port: int) -> None:
    """Raises UserError where the port is taken, keys are needed and there are none, traces have nowhere to go, or a
    roll-out cannot be."""
    rollouts.check(settings.checkpoint, settings.serving)
    if settings.serving.authentication == "on" and not list_keys(settings.serving.state):
        raise UserError(
            f"serving.authentication is on, and there are no API keys under {settings.serving.state}: make one by "
            "`mu2llm key make`"
        )
    if settings.serving.traces:
        sender()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"{host}:{port} cannot be used: {error.strerror}; give another --host or --port") from None


@contextlib.contextmanager
def running(settings: Settings, host: str, port: int) -> Iterator[str]:
    """The service's address, as long as the block lasts; what it has begun is finished before it ends."""
    options = HTTPOptions(host=host, port=port, keep_alive_timeout_s=120)
    _check_running(options)
    tracing_config = tracing(settings.serving.traces)
    serve.start(http_options=options, logging_config=log_lines(), tracing_config=tracing_config)
    deploy(settings)
    try:
        yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    finally:
        serve.delete(NAME)
        if not serve.status().applications:
            serve.shutdown()


def _check_running(options: HTTPOptions) -> None:
    """Raises UserError where Serve runs already and listens otherwise: it would keep to that, whatever is asked."""
    there = private_apis.running_http_options()
    names = ("host", "port", "root_path") if there else ()
    differs = [name for name in names if getattr(there, name) != getattr(options, name)]
    if differs:
        told = ", ".join(f"{name} {getattr(there, name)}" for name in differs)
        raise UserError(
            f"Ray Serve runs here already, with {told}: give the same by --host and --port, or end it (serve shutdown)"
        )


def deploy(settings: Settings) -> None:
    """Starts the application, or updates the one that runs: another checkpoint takes over without a pause."""
    target = RunTarget(target=application(settings), name=NAME, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)


def watch() -> None:
    """Returns when the application is gone; a Failure where it cannot be deployed."""
    while True:
        time.sleep(LOOK_S)
        told = serve.status().applications.get(NAME)
        if told is None:
            return
        if told.status == ApplicationStatus.DEPLOY_FAILED:
            first = (told.message.strip().splitlines() or ["no reason given"])[0]
            raise Failure(f"the service could not be deployed: {first}; its logs are in Ray's session folder")

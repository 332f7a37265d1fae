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

from mu2llm.errors import Failure, UserError
from mu2llm.serving.app import NAME, Settings, application
from mu2llm.serving.guard import is_loopback
from mu2llm.serving.ingress import keys_needed
from mu2llm.serving.keys import list_keys

LOOK_S = 1.0


def check(settings: Settings, host: str, port: int) -> None:
    """Raises UserError where the port is taken, or where keys are needed and there are none."""
    if keys_needed(settings.serving, is_loopback(host)) and not list_keys(settings.serving.state):
        raise UserError(
            f"{host} can be reached from elsewhere, so API keys are on, and there are none under "
            f"{settings.serving.state}: make one by `mu2llm key make`"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"{host}:{port} cannot be used: {error.strerror}; give another --host or --port") from None


@contextlib.contextmanager
def running(settings: Settings, host: str, port: int) -> Iterator[str]:
    """The service's address, as long as the block lasts; what it has begun is finished before it ends."""
    serve.start(http_options=HTTPOptions(host=host, port=port, keep_alive_timeout_s=120))
    deploy(settings)
    try:
        yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    finally:
        serve.delete(NAME)
        if not serve.status().applications:
            serve.shutdown()


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

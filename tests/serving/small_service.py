"""Where a service of the tests listens, when it is ready, and whose scans it is sent."""

import socket
import ssl
import subprocess
import time
from collections.abc import Callable

import httpx

PATIENT, PATIENT_ID, STUDY = "Mustermann^Erika", "ID-4711", "1.2.826.0.1.3680043.8.498.7"
GUARD_S = 500  # of every wait: nothing is expected to take as long, on any machine
PLAIN = ssl.create_default_context()  # for plain HTTP; httpx would read the authorities' certificates at every call


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def url_of(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def post(url: str, **what: object) -> httpx.Response:
    return httpx.post(url, verify=PLAIN, timeout=GUARD_S, **what)


def wait_for(true: Callable[[], object], what: str = "it") -> None:
    """Until it is so."""
    deadline = time.monotonic() + GUARD_S
    while not true():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.1)


def wait_until_ready(url: str, running: subprocess.Popen | None = None) -> None:
    """Until the service there says that it is ready, as long as the process of `mu2llm serve` runs."""

    def ready() -> bool:
        assert running is None or running.poll() is None, running.stderr.read()
        try:
            return httpx.get(f"{url}/readyz", verify=PLAIN, timeout=GUARD_S).status_code == 200
        except httpx.TransportError:
            return False

    wait_for(ready, f"{url}/readyz")

"""Where a service of the tests listens, when it is ready, and whose scans it is sent."""

import socket
import time

import httpx

PATIENT, PATIENT_ID, STUDY = "Mustermann^Erika", "ID-4711", "1.2.826.0.1.3680043.8.498.7"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(url: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url} was not ready within {seconds} s")

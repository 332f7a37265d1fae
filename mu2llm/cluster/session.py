"""Which Ray a command joins."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions

from mu2llm import private_apis
from mu2llm.errors import Failure, UserError
from mu2llm.memory import machine_memory

CONNECT_S = 2
LEAST_STORE = 2**30  # bytes of an object store
SHARED_MEMORY = Path("/dev/shm")
TOKEN_FIX = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token (or RAY_AUTH_TOKEN); "
    "cluster/README.md says where it is kept"
)


@contextlib.contextmanager
def session(address: str | None = None, cpus: int | None = None) -> Iterator[None]:
    """Joins the Ray at `address` or RAY_ADDRESS, else one that is already joined, else starts its own.

    What was started here is stopped at the end; what was there before is left alone. A cluster of its own
    counts at least four logical CPUs, so that a training worker and the tasks that feed it fit on any laptop.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith("http"):
        raise UserError(
            f"--address {address} is where jobs are sent: use `mu2llm submit` with it; a command joins HOST:6379"
        )
    # the drivers' environment is what the workers inherit; set before Ray starts
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "OMP_WAIT_POLICY" not in os.environ:
        # threads that wait for each other spin for microseconds, then leave the core to whoever else is at work
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        if _refuses(address):  # asked first: Ray tries for a minute, and says at last that there is no cluster
            raise _no_token(address)
        try:
            ray.init(address=address, **quiet)
        except ray.exceptions.AuthenticationError as error:
            raise _no_token(address) from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise Failure(
                f"no Ray cluster at {address}: {str(error).splitlines()[0]}; start one or drop --address"
            ) from error
    else:
        ray.init(
            address="local",  # also where another Ray runs on this machine
            num_cpus=max(cpus or os.cpu_count() or 1, 4),
            include_dashboard=False,
            object_store_memory=object_store(),
            configure_logging=True,
            **quiet,
        )
    quieten_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def object_store() -> int:
    """Bytes of the object store of a Ray of our own: a sixteenth of the machine's memory, as far as shared memory has
    them, and at least `LEAST_STORE`."""
    share = machine_memory() // 16
    if SHARED_MEMORY.is_dir():
        share = min(share, shutil.disk_usage(SHARED_MEMORY).free * 9 // 10)
    return max(LEAST_STORE, share)


def _no_token(address: str) -> UserError:
    said = "refused the token" if os.environ.get("RAY_AUTH_MODE") == "token" else "asks for a token"
    return UserError(f"the Ray cluster at {address} {said}: {TOKEN_FIX}")


def _refuses(address: str) -> bool:
    """Whether the cluster at HOST:PORT is there and refuses whoever has not its token."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        private_apis.ask_head(f"{host}:{port}")
    except ray.exceptions.AuthenticationError:
        return True
    except (OSError, ValueError, ray.exceptions.RayError, RuntimeError):
        return False
    return False


def quieten_ray_data() -> None:
    """Ray Data's own bars and log lines go: the commands show one progress line of their own."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)

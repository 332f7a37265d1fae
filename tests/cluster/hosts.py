"""Ray nodes as separate `ray start` processes on one machine, each with its own session folder; ended by process group.

`ray stop` is never called: it would end every Ray of the machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import requests
from patience import PATIENCE

ROOT = Path(__file__).parents[2]
RAY, COMMAND = (Path(sys.executable).parent / name for name in ("ray", "mu2llm"))
GUARD_S = 500  # nothing is expected to take as long
STARTS = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Node:
    """A running `ray start --block` and its children, with ports of its own."""

    def __init__(self, arguments: list[str], cpus: int, environment: dict[str, str], ip: str = "127.0.0.1") -> None:
        # short: a socket's path may have 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="mu", dir="/tmp"))
        self.log = self.folder / "start.log"
        common = [f"--num-cpus={cpus}", f"--node-ip-address={ip}", f"--object-store-memory={200 * 2**20}"]
        common += ["--min-worker-port=0", "--max-worker-port=0"]  # else all nodes hand out the same ports
        common += [
            f"--{name}-port={free_port()}"
            for name in (
                *("node-manager", "object-manager", "dashboard-agent-grpc", "dashboard-agent-listen"),
                "metrics-export",
            )
        ]
        words = ["start", "--block", "--disable-usage-stats", *arguments, *common]
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                self._command(words, environment),
                env=environment,
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _command(self, words: list[str], environment: dict[str, str]) -> list[str]:
        return [str(RAY), *words, "--temp-dir", str(self.folder)]

    def timed_out(self) -> bool:
        """Whether Ray gave it up; waits until it is up, or has ended."""
        deadline = time.monotonic() + GUARD_S
        while self.process.poll() is None and "Ray runtime started" not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)
        return self.process.poll() is not None and "timed out during startup" in self.log.read_text()

    def kill(self) -> None:
        """At once, as when a machine goes: the node and every worker on it."""
        try:
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Hosts:
    """A head with dashboard and token authentication, and workers that come and go. Use as a context manager."""

    def __init__(self, head_cpus: int = 2, environment: dict[str, str] | None = None, token: bool = True) -> None:
        self.token = secrets.token_hex(16)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MU2LLM_"))},
            **(environment or {}),
            "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",  # a job is started as `python ray_jobs/…`
            "OMP_NUM_THREADS": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            **PATIENCE,
            # a machine that goes is noticed within seconds
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            **({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} if token else {"RAY_AUTH_MODE": "disabled"}),
        }
        self.port, self.dashboard_port = free_port(), free_port()
        self.head_cpus = head_cpus
        self.nodes: list[Node] = []

    @property
    def gcs(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def __enter__(self) -> Hosts:
        arguments = ["--head", f"--port={self.port}", f"--dashboard-port={self.dashboard_port}"]
        arguments += [
            "--dashboard-host=127.0.0.1",
            "--include-dashboard=true",
            f"--ray-client-server-port={free_port()}",
        ]
        self._start(arguments, self.head_cpus)
        self._wait_until_up()
        return self

    def worker(self, cpus: int = 1) -> Node:
        return self._start([f"--address={self.gcs}"], cpus)

    def _start(self, arguments: list[str], cpus: int) -> Node:
        """A node that is up or begins; another where Ray gave it up, as it does after 30 s on a loaded machine."""
        for _ in range(STARTS - 1):
            node = self._node(arguments, cpus)
            if not node.timed_out():
                break
            node.kill()
        else:
            node = self._node(arguments, cpus)
        self.nodes.append(node)
        return node

    def _node(self, arguments: list[str], cpus: int) -> Node:
        return Node(arguments, cpus, self.environment)

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + GUARD_S
        while time.monotonic() < deadline and self.nodes[0].process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.dashboard_port)) == 0:
                    return
            time.sleep(0.2)
        raise AssertionError(f"the head did not start: {self.nodes[0].log.read_text()[-3000:]}")

    def _get(self, path: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"}
        return requests.get(f"{self.address}/api/{path}", headers=headers, timeout=GUARD_S).json()

    def job(self, id: str) -> dict[str, Any]:
        """All that the cluster tells of a job: status, entrypoint, metadata, runtime environment."""
        return self._get(f"jobs/{id}")

    def wait_for(self, count: int) -> None:
        """Until as many nodes are there, not more and not fewer."""
        deadline, alive = time.monotonic() + GUARD_S, -1
        while alive != count:
            logs = "\n".join(node.log.read_text()[-1000:] for node in self.nodes if node.log.exists())
            assert time.monotonic() < deadline, f"{alive} nodes are there, not {count}: {logs}"
            time.sleep(0.2)
            with contextlib.suppress(requests.ConnectionError):  # the dashboard begins
                rows = (self._get("v0/nodes").get("data") or {}).get("result", {}).get("result", [])
                alive = sum(node["state"] == "ALIVE" for node in rows)

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            node.kill()


def user(hosts: Hosts, **environment: str | None) -> dict[str, str]:
    """The environment of a user's shell: the token, the address, and no Ray of its own."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": hosts.token, "RAY_API_SERVER_ADDRESS": hosts.address}
    return {name: value for name, value in {**mine, **token, **environment}.items() if value is not None}


def mu2llm(hosts: Hosts, *arguments: object, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """`mu2llm …` as a user of that cluster runs it, in the checkout."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        env=user(hosts, **environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def ingest(scans: Path, out: Path) -> list[object]:
    """The job, and what it is told."""
    return ["ingest", "--preset", "tiny", "--manifest", scans / "manifest.jsonl", "--volumes", scans, "--out", out]

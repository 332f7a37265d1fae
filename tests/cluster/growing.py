"""A Ray cluster that scales itself on one machine: Ray's autoscaler (v2) with its provider of local fake nodes.

Ray's own `AutoscalingCluster` is not used: it reads a file that the wheel lacks, and ends every Ray of the machine.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ray
from hosts import Hosts, Node, free_port
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

IDLE_S = 6  # after which a node without work is let go
WORKER = "worker"


class Growing(Hosts):
    """A head without CPUs, and up to `most` nodes of so many CPUs, which come as work asks for them and go again."""

    def __init__(self, cpus: int, most: int, environment: dict[str, str] | None = None) -> None:
        fake = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_health_check_failure_threshold": "30",  # a node on a loaded machine is slow, not gone
        }
        super().__init__(0, {**fake, **(environment or {})}, token=False)
        self.cpus, self.most = cpus, most
        self.ip = ray.util.get_node_ip_address()  # which the provider's nodes take too

    @property
    def gcs(self) -> str:
        return f"{self.ip}:{self.port}"

    def _node(self, arguments: list[str], cpus: int) -> Node:
        self.config = Path(f"/tmp/mu-growing-{free_port()}.json")
        self.config.write_text(json.dumps(self._autoscaling()))
        return Node([*arguments, f"--autoscaling-config={self.config}"], cpus, self.environment, self.ip)

    def _autoscaling(self) -> dict[str, object]:
        provider = {
            "type": "external",  # by its own name Ray looks for a file that the wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": self.gcs,
        }
        worker = {"resources": {"CPU": self.cpus, "object_store_memory": 200 * 2**20}, "node_config": {}}
        commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        return {
            "cluster_name": "growing",
            "max_workers": self.most,
            "provider": provider,
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                WORKER: {**worker, "min_workers": 0, "max_workers": self.most},
            },
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": IDLE_S / 60,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            **{f"{name}_commands": [] for name in commands},
        }

    def __exit__(self, *what: object) -> None:
        super().__exit__(*what)
        self.config.unlink()


class Watcher:
    """How many nodes with CPUs there are, second by second, while it is entered."""

    def __init__(self) -> None:
        self.changes: list[tuple[float, int]] = [(0.0, nodes())]
        self._started, self._stop = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            count = nodes()
            if count != self.changes[-1][1]:
                self.changes.append((self.seconds, count))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def most(self) -> int:
        return max(count for _, count in self.changes)

    def first(self, count: int) -> float:
        """Seconds until there were so many nodes."""
        return next(at for at, there in self.changes if there >= count)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def nodes() -> int:
    """Nodes with CPUs that are alive."""
    return sum(bool(each["Alive"] and each["Resources"].get("CPU")) for each in ray.nodes())


@contextlib.contextmanager
def joined(cluster: Growing) -> Iterator[None]:
    """This process is a driver of the cluster."""
    from mu2llm import cluster as ours

    with ours.session(cluster.gcs):
        yield

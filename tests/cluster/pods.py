"""Ray nodes that run in the image as the manifests run them: user 1000, no capabilities, a read-only root, a /tmp of
their own, and one folder that all share at /mnt. By crun, as root; they share the machine's network."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from pathlib import Path

from hosts import Hosts, Node

# where groups of both versions are mounted, crun refuses: it sees those of version 2 alone
WITH_CGROUPS = (
    'umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; exec crun --cgroup-manager=disabled "$@"'
)
PATH = "/opt/mu2llm/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PASSED_ON = ("RAY_", "OMP_", "MLFLOW_", "AWS_")


def crun(*words: object) -> list[str]:
    return ["unshare", "--mount", "sh", "-c", WITH_CGROUPS, "sh", *map(str, words)]


def bundle(folder: Path, image: str, shared: Path, words: list[str], environment: dict[str, str]) -> None:
    """Writes what crun is to run below `folder`: the words in the image that is mounted at `image`."""
    subprocess.run(["crun", "spec"], cwd=folder, check=True)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    told = json.loads((folder / "config.json").read_text())
    told["root"] = {"path": image, "readonly": True}
    told["process"] |= {
        "terminal": False,
        "user": {"uid": 1000, "gid": 1000},
        "args": words,
        "cwd": "/home/ray/mu2llm",
        "env": [f"{name}={value}" for name, value in {"PATH": PATH, "HOME": "/home/ray", **environment}.items()],
        "capabilities": {kind: [] for kind in told["process"]["capabilities"]},
        "noNewPrivileges": True,
    }
    told["process"].pop("rlimits", None)
    spaces = told["linux"]["namespaces"]
    told["linux"]["namespaces"] = [each for each in spaces if each["type"] not in ("network", "cgroup")]
    told["mounts"] = [each for each in told["mounts"] if each["destination"] not in ("/sys/fs/cgroup", "/dev/shm")]
    own = {"/tmp": folder / "tmp", "/mnt": shared}
    told["mounts"] += [
        {"destination": place, "type": "bind", "source": str(source), "options": ["rbind", "rw"]}
        for place, source in own.items()
    ]
    memory = ["nosuid", "nodev", "mode=1777", "size=1g"]  # KubeRay gives a pod the same
    told["mounts"].append({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": memory})
    (folder / "config.json").write_text(json.dumps(told))


class Pod(Node):
    """`ray start` in a container of its own."""

    def __init__(self, image: str, shared: Path, arguments: list[str], cpus: int, environment: dict[str, str]) -> None:
        self.image, self.shared = image, shared
        super().__init__(arguments, cpus, environment)

    def _command(self, words: list[str], environment: dict[str, str]) -> list[str]:
        passed = {name: value for name, value in environment.items() if name.startswith(PASSED_ON)}
        bundle(self.folder, self.image, self.shared, ["ray", *words], passed)
        return crun("run", "--bundle", self.folder, self.folder.name)

    def kill(self) -> None:
        name = self.folder.name
        super().kill()
        subprocess.run(crun("delete", "--force", name), capture_output=True)


class Pods(Hosts):
    """A head and workers in the image that is mounted at `image`. `shared` is the folder that they see as /mnt."""

    def __init__(self, image: str, shared: Path, environment: dict[str, str]) -> None:
        super().__init__(2, environment)
        self.image, self.shared = image, shared

    def _node(self, arguments: list[str], cpus: int) -> Node:
        return Pod(self.image, self.shared, arguments, cpus, self.environment)

    def on_head(self, *words: object) -> list[str]:
        """The command that runs the words in the head's container."""
        return crun("exec", "--user", "1000:1000", self.nodes[0].folder.name, *words)


def run(image: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The words in a container of their own, to their end. It has a token, as pods have: Ray would write one below the
    home folder, which can't be written to."""
    folder.mkdir()
    (folder / "shared").mkdir()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    bundle(folder, image, folder / "shared", list(words), {"OMP_NUM_THREADS": "1", **token})
    return subprocess.run(crun("run", "--bundle", folder, f"mu2llm-{os.getpid()}"), capture_output=True, text=True)

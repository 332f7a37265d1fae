"""Where a stage fits on the cluster: whether its workers can ever be placed on the nodes."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import ray

from mu2llm import private_apis
from mu2llm.errors import UserError
from mu2llm.settings.stages import StageConfig

if TYPE_CHECKING:
    from mu2llm.stages.job import Job

logger = logging.getLogger(__name__)
UNKNOWN = sys.maxsize  # of what a cluster that scales itself can grow to


def check(job: Job) -> None:
    """A UserError where the job cannot be trained as it is asked for, or its workers can never fit the cluster."""
    settings = job.settings
    least, most = _range(settings)
    for workers in range(max(least, 1), most + 1):
        if settings.batch_size % workers:
            raise UserError(f"batch_size {settings.batch_size} is global: it does not divide among {workers} workers")
    if settings.fsdp:
        _check_sharding(job)
    if job.total_steps == 1 and settings.warmup:
        raise UserError(
            f"{job.stage} would learn nothing: {job.rows} rows make one step, and warm-up makes its learning rate 0; "
            f"give more rows, {job.stage}.epochs or {job.stage}.max_steps, or set {job.stage}.warmup=0"
        )
    _check_room(settings)


def _range(settings: StageConfig) -> tuple[int, int]:
    """The least and the most workers."""
    return (settings.workers, settings.workers) if isinstance(settings.workers, int) else settings.workers


def _check_sharding(job: Job) -> None:
    """What FSDP does not do: it shards no single numbers, and no rank alone can write reports."""
    least, _ = _range(job.settings)
    reasons = {
        f"it shards over workers, and there may be {least}: ask for 2 or more": least < 2,
        "the contrastive stage trains the vision encoder, which any GPU holds": job.stage == "contrastive",
        "a learned temperature is a single number: set model.tokenizer.temperature_mode to fixed or annealed": (
            job.resolved.model.tokenizer.temperature_mode == "learned"
        ),
        "sweeps have rank 0 write reports while it trains, which then holds a part of the model": bool(job.watch),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"{job.stage}.fsdp={job.settings.fsdp}: {reason}, or unset {job.stage}.fsdp")


def _check_room(settings: StageConfig) -> None:
    """A UserError where the cluster will never have room for the least number of workers, as far as it tells."""
    need, (least, _) = resources(settings), _range(settings)
    fit = workers_that_fit(need)
    each = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
    if fit == UNKNOWN and (there := workers_on_nodes(need)) < least:
        logger.warning("%d workers of %s wait until the cluster has grown: its nodes hold %d now", least, each, there)
    if least > fit:
        raise UserError(
            f"{least} workers of {each}: the cluster's nodes hold {fit} of these; a worker is on one node: "
            "ask for fewer workers, for less each, or join a larger cluster"
        )


def workers_that_fit(need: Mapping[str, float]) -> int:
    """As many as the nodes hold, as the cluster is or, where it scales itself, as it can grow to; `UNKNOWN` where it
    does not tell."""
    nodes = workers_on_nodes(need)
    grown = private_apis.cluster_limits()
    if grown is None:
        return UNKNOWN if private_apis.scales_itself() else nodes
    most = sum(_slots(group.resources, need) * int(_limit(group.max_count)) for group in grown.node_group_configs)
    limits = {name: grown.max_resources[name] for name in need if name in grown.max_resources}
    return max(nodes, min(most, _slots(limits, {name: need[name] for name in limits})))


def workers_on_nodes(need: Mapping[str, float]) -> int:
    """As many as the nodes hold that are there now."""
    return room((node["Resources"] for node in ray.nodes() if node["Alive"]), need)


def room(nodes: Iterable[Mapping[str, Any]], need: Mapping[str, float]) -> int:
    """How many processes with `need` each such nodes hold, by their resources: one is on one node, whole."""
    return sum(_slots(node, need) for node in nodes)


def _slots(have: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How often `each` goes into `have`."""
    times = (math.floor(_limit(have.get(name, 0)) / amount + 1e-6) for name, amount in each.items() if amount)
    return min(times, default=sys.maxsize)


def _limit(number: float) -> float:
    return sys.maxsize if number < 0 else number  # Ray's −1: none


def resources(settings: StageConfig) -> dict[str, float]:
    resources = {"CPU": settings.cpus_per_worker}
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    return resources

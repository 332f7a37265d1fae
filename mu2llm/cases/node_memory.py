"""The memory that reading a scan takes: what a task asks Ray for, in few classes, and what no node has room for."""

from __future__ import annotations

import ray

from mu2llm import private_apis

PROCESS = 2**29  # bytes that the process of a task takes by itself
MOST = 8  # times the bytes of its files that a scan takes while it is read: unpacked, resampled, on its way
LEAST = 2  # times that every scan takes
SMALLEST = 2**27  # bytes of the smallest class; each further one is twice the one before


def largest_node() -> int | None:
    """Bytes that Ray counts on the largest node that runs tasks, or that the cluster may add; None: none is known."""
    limits = private_apis.cluster_limits()
    groups = [dict(each.resources) for each in limits.node_group_configs if each.max_count] if limits else []
    there = [each["Resources"] for each in ray.nodes() if each["Alive"]]
    return int(max((each.get("memory", 0) for each in [*there, *groups] if each.get("CPU", 0) >= 1), default=0)) or None


def asked(size: int, node: int | None) -> int:
    """Bytes that a task asks for whose largest scan is of `size` bytes; never more than the largest node has."""
    grade = SMALLEST
    while grade < MOST * size:
        grade *= 2
    return min(PROCESS + grade, node) if node else PROCESS + grade


def fits(size: int, node: int | None) -> bool:
    """Whether a node has room for a scan of `size` bytes."""
    return node is None or PROCESS + LEAST * size <= node

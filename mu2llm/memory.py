"""How much memory a command and all that it started took."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

USABLE = 0.9
"""Fraction of a GPU's memory that tensors can have: the rest is CUDA's context, kernels' workspaces, fragments."""


class PeakMemory:
    """Highest PSS of the process tree while it runs, in GiB; shared pages are counted once.

    Looked at every `interval` seconds in a thread: a shorter peak can be missed. PSS costs a walk through every page
    table (0.3 s for 23 processes), so it is only taken where an estimate, which costs little, is a new high.
    """

    STEP = 1.01  # of the estimate, from which PSS is taken anew

    def __init__(self, interval: float = 1.0) -> None:
        self.interval = interval
        self.gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _watch(self) -> None:
        highest = 0.0
        while not self._stop.wait(self.interval):
            estimate = tree_estimate()
            if estimate > highest * self.STEP:
                highest = estimate
                self.gib = max(self.gib, tree_pss() / 2**30)


def machine_memory() -> int:
    """Bytes of this machine, or of its container where that is given less."""
    limits = [psutil.virtual_memory().total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is one of them, or none; `max` is no limit
            limits.append(int(Path(file).read_text()))
    return min(limits)


def tree_estimate() -> int:
    """Bytes that are each process's own, and once the most that one of them shares."""
    memory = _of_tree(psutil.Process.memory_info)
    shared = [getattr(each, "shared", 0) for each in memory]
    return sum(each.rss for each in memory) - sum(shared) + max(shared, default=0)


def tree_pss() -> int:
    """Bytes of PSS of this process and its descendants; of RSS where the system has no PSS (macOS)."""
    return sum(getattr(each, "pss", each.rss) for each in _of_tree(psutil.Process.memory_full_info))


def _of_tree(memory_of: Callable[[psutil.Process], Any]) -> list[Any]:
    """What `memory_of` gives of this process and its descendants, without those that ended while we looked."""
    me = psutil.Process()
    found = []
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            found.append(memory_of(process))
    return found

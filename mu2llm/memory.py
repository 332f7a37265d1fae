"""How much memory a command and all that it started took."""

from __future__ import annotations

import threading

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


def tree_estimate() -> int:
    """Bytes that are each process's own, and once the most that one of them shares."""
    own, shared = 0, 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            memory = process.memory_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended while we looked
        share = getattr(memory, "shared", 0)
        own, shared = own + memory.rss - share, max(shared, share)
    return own + shared


def tree_pss() -> int:
    """Bytes of PSS of this process and its descendants; of RSS where the system has no PSS (macOS)."""
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            memory = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended while we looked
        total += getattr(memory, "pss", memory.rss)
    return total

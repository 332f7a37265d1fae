"""How work reports how far it is, to whoever shows it: a bar in the terminal, a line in a job's log, a page."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

Counted = Callable[[int, int], None]
"""(done, of how many)"""
Logged = Callable[[dict[str, float]], None]
"""The numbers that a training stage logs at a step; among them `step` and `total`."""
Steps = Callable[[str, float, float, dict[str, float]], None]
"""(step's name, done, of how many, numbers): of work with several named steps, each counted or logged."""

SHOWN = {"loss": "loss", "samples/s": "samples_per_second", "wait": "data_wait_share"}
"""Of a stage's numbers those that are shown: short name → name."""


def counted(steps: Steps, name: str) -> Counted:
    """One step of several that counts what is done."""
    return lambda done, total: steps(name, done, total, {})


def logged(steps: Steps, name: str) -> Logged:
    """One step of several that is a training stage."""
    return lambda numbers: steps(name, numbers.get("step", 0), numbers["total"], numbers)


def numbers_text(numbers: Mapping[str, float]) -> str:
    """`loss 1.2 samples/s 3`, of those that are there."""
    return " ".join(f"{short} {numbers[name]:.3g}" for short, name in SHOWN.items() if name in numbers)


@contextlib.contextmanager
def polled(look: Callable[[], None], every_s: float) -> Iterator[None]:
    """While the block lasts `look` is called in a thread, each so many seconds; and once more when it has ended."""
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(every_s):
            look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()

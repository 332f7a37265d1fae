"""Batches made ready in a thread while the model works on the one before."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Full, Queue
from typing import Any

import torch

DEPTH = 2  # batches that wait for the training
LOOK_S = 0.1  # between two looks of the thread whether anybody still reads
PATIENCE_S = 5  # for a thread that waits for data which nobody wants any more


def read_ahead(make: Callable[[], Iterable[Any]], waited: Callable[[float], None]) -> Iterator[Any]:
    """What `make()` gives, in its order, made in a thread up to `DEPTH` items ahead; its exceptions are raised here.

    `waited` is told the seconds that each item was waited for. The thread ends with the iterator. It computes with
    as many torch threads as the caller.
    """
    queue: Queue[tuple[bool, Any]] = Queue(DEPTH)
    ended, threads = threading.Event(), torch.get_num_threads()

    def put(more: bool, item: Any) -> None:
        while not ended.is_set():
            with contextlib.suppress(Full):
                queue.put((more, item), timeout=LOOK_S)
                break

    def work() -> None:
        torch.set_num_threads(threads)
        try:
            for item in make():
                put(True, item)
                if ended.is_set():
                    return
        except BaseException as error:  # raised where it is read
            put(False, error)
        else:
            put(False, None)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            asked = time.perf_counter()
            more, item = queue.get()
            waited(time.perf_counter() - asked)
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        ended.set()
        thread.join(PATIENCE_S)


def pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose tensors a GPU can fetch while the CPU goes on; as it is where there is none."""
    if not torch.cuda.is_available():
        return batch
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

"""Batches made in a thread: the same, in the same order, and nothing is left behind."""

import threading
import time

import pytest
import torch

from mu2llm.stages.read_ahead import DEPTH, pinned, read_ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_items_come_in_their_order_and_the_thread_goes():
    waits = []
    assert list(read_ahead(lambda: range(20), waits.append)) == list(range(20))
    assert len(waits) == 21 and all(wait >= 0 for wait in waits)
    assert not threads()


def test_no_more_is_made_than_will_soon_be_read_and_leaving_ends_it():
    made = []
    items = read_ahead(lambda: (made.append(i) or i for i in range(100)), lambda _: None)
    assert next(items) == 0
    for _ in range(100):
        time.sleep(0.01)
    assert len(made) <= 2 + DEPTH
    items.close()
    assert not threads()


def test_what_goes_wrong_there_is_raised_here():
    def broken():
        yield 1
        raise ValueError("no such row")

    items = read_ahead(broken, lambda _: None)
    assert next(items) == 1
    with pytest.raises(ValueError, match="no such row"):
        next(items)
    assert not threads()


def test_it_waits_for_what_is_slow_and_says_how_long():
    waits = []

    def slow():
        for i in range(3):
            time.sleep(0.05)
            yield i

    assert list(read_ahead(slow, waits.append)) == [0, 1, 2]
    assert sum(waits) > 0.1


def test_it_computes_with_the_threads_of_who_asked():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert list(read_ahead(lambda: (torch.get_num_threads() for _ in range(1)), lambda _: None)) == [1]
    finally:
        torch.set_num_threads(before)


def test_without_a_gpu_nothing_is_pinned():
    batch = {"a": torch.ones(2), "case_ids": ["x"], "full_chunks": 3}
    assert pinned(batch) is batch

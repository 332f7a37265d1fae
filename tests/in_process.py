"""Ray Data's actors in this process: the same batches through the same objects, without a process to start for each.

On Ray they are held in engine/test_generate.py, evaluation/test_judging.py and test_pipeline.py.
"""

from collections.abc import Iterator
from typing import Any

import ray.data

on_ray = ray.data.Dataset.map_batches


class Mapped:
    """What `map_batches` gives, as the engine reads it: each batch as the actor returned it."""

    def __init__(self, rows: ray.data.Dataset, actor: Any, batch_size: int | None) -> None:
        self.rows, self.actor, self.batch_size = rows, actor, batch_size

    def iter_batches(self, **_: Any) -> Iterator[Any]:
        for batch in self.rows.iter_batches(batch_size=self.batch_size, batch_format="numpy"):
            yield self.actor(batch)


def map_batches(rows: ray.data.Dataset, call: Any, **how: Any) -> Any:
    if not isinstance(call, type):
        return on_ray(rows, call, **how)
    return Mapped(rows, call(*how["fn_constructor_args"]), how["batch_size"])

"""Models in Ray Data actors: how many, what each gets, and what is told of one that failed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import ray.data
import torch
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from mu2llm.errors import Failure, UserError
from mu2llm.settings.inference import InferenceConfig


def on_actors(
    rows: ray.data.Dataset, actor: type, arguments: tuple[Any, ...], settings: InferenceConfig, count: int
) -> ray.data.Dataset:
    """Batches of `settings.batch_size` of the `count` rows through actors made of `arguments`."""
    batches = math.ceil(count / settings.batch_size)
    return rows.map_batches(
        actor, fn_constructor_args=arguments, batch_size=settings.batch_size, **resources(settings, batches)
    )


def resources(settings: InferenceConfig, batches: int) -> dict[str, Any]:
    """What `map_batches` is told of the actors that are to take so many batches."""
    return {
        "batch_format": "numpy",
        "compute": actor_pool(settings.actors, batches),
        "num_cpus": settings.cpus_per_actor,
        "num_gpus": settings.gpus_per_actor,
    }


def actor_pool(actors: int | None, batches: int) -> ActorPoolStrategy:
    """So many actors, or as many as the cluster has room for; never more than there are batches."""
    if actors:
        return ActorPoolStrategy(size=min(actors, batches))
    return ActorPoolStrategy(min_size=1, max_size=batches)


def use_cpus(settings: InferenceConfig) -> None:
    """An actor computes with as many threads as it has CPUs."""
    torch.set_num_threads(max(1, int(settings.cpus_per_actor)))


@contextlib.contextmanager
def failures(what: str, mend: str) -> Iterator[None]:
    """An actor's own UserError or Failure as it is, and whatever else ends it as a Failure of one line."""
    try:
        yield
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError | Failure):
            raise cause from error
        why = str(cause or error).strip().splitlines()[0]
        raise Failure(f"{what} failed: {type(cause or error).__name__}: {why}; {mend}") from error

"""The one place for what other packages do not promise to keep, each with the reason why it is used.

tests/test_private_apis.py fails where an upgrade changes one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ray.data
    from ray.job_submission import JobSubmissionClient

PAUSE_S = 0.02
TOKENS = "ray._private.authentication.authentication_token_setup"


def cluster_limits() -> Any | None:
    """What the cluster can grow to, as Ray's `ClusterConfig`; None where it does not scale itself, or does not tell.

    Ray's public state names the nodes that are there, not those that the autoscaler may add. Of Ray 2.60's own
    autoscalers none tells (tests/cluster/test_growing.py): see `scales_itself`.
    """
    import ray

    return ray._private.state.state.get_cluster_config()


def scales_itself() -> bool:
    """Whether an autoscaler (v2) tells this cluster's head of itself. Ray's public state has nothing of it."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    told = GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10)
    return bool(GetClusterStatusReply.FromString(told).autoscaling_state.autoscaler_state_version)


def running_http_options() -> Any | None:
    """The HTTPOptions of the Serve that runs on this Ray; None where there is none. `serve.status` does not tell."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return client and client.http_config


def largest_resources() -> dict[str, float]:
    """Resource → the most of it that the cluster can grow to; empty where it does not scale itself."""
    import ray

    return dict(ray._private.state.state.get_max_resources_from_cluster_config() or {})


def ask_head(address: str) -> None:
    """Speaks to the head of a Ray cluster at HOST:PORT; an AuthenticationError where it wants a token and has none.

    `ray.init` says of such a cluster only that it could not be joined. What Ray's core writes to stderr meanwhile is in
    the exception too.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    with _stderr_of_the_core_closed():
        GcsClient(address=address)


@contextlib.contextmanager
def _stderr_of_the_core_closed() -> Iterator[None]:
    """Meanwhile what C++ writes to file descriptor 2 goes nowhere."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def pause_scheduler(dataset: ray.data.Dataset) -> None:
    """Lets Ray Data's scheduler rest `PAUSE_S` seconds after each of its turns.

    It is a thread of the consuming process. When the readers are ahead it turns without a pause and holds the
    interpreter lock: it took half the time of a small training step. Ray Data has no setting for it.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pause(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            time.sleep(PAUSE_S)

    dataset.context.custom_execution_callback_classes = [Pause]


def use_token() -> None:
    """Ray's own token is sent where there is one, also where nobody said that the cluster asks for it.

    Ray does so in `ray.init` and in its command line, but not in the client of its jobs API.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    logging.getLogger(TOKENS).setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def ray_version(client: JobSubmissionClient) -> str:
    """The version of Ray on a cluster; the client's public `get_version` gives that of its API alone."""
    return str(client._do_request("GET", "/api/version").json()["ray_version"])


def quiet_job_client() -> None:
    """The jobs client logs at level INFO what we say in one line."""
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private"):
        logging.getLogger(name).setLevel(logging.WARNING)


def allow_fsdp_on_cpu() -> None:
    """Lets accelerate shard over gloo as it does over GPUs, which torch can: it passes over FSDP there in silence."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:  # type: ignore[attr-defined]
        state.distributed_type = DistributedType.MULTI_GPU


@contextlib.contextmanager
def moments_may_be_missing() -> Iterator[None]:
    """Lets accelerate load a sharded optimiser's state without that of weights that no step has reached, as they were
    frozen or left out up to there: torch does so if it is told, and accelerate does not tell it."""
    from accelerate.utils import fsdp_utils

    strict = fsdp_utils._prepare_sd_options

    def lenient(plugin: Any) -> Any:
        options = strict(plugin)
        return options and dataclasses.replace(options, strict=False)

    fsdp_utils._prepare_sd_options = lenient
    try:
        yield
    finally:
        fsdp_utils._prepare_sd_options = strict


def layer_classes(model: Any) -> set[str]:
    """Names of the classes of a transformers model's layers, each of which stays on one device."""
    return {type(module).__name__ for module in model.modules()} & set(model._no_split_modules)


def crimson_scorer(model: str) -> Any:
    """crimson-score's scorer of answers by a model that others serve, without the client that it makes for itself."""
    from CRIMSON.generate_score import CRIMSONScore

    scorer = CRIMSONScore.__new__(CRIMSONScore)
    scorer.api, scorer.model_name = "vllm", model  # by its name it knows its own model, which takes a shorter prompt
    return scorer


def crimson_prompt(scorer: Any, reference: str, candidate: str) -> str:
    """What CRIMSON asks of two reports."""
    return str(scorer._build_evaluation_prompt(reference, candidate))


def crimson_score(scorer: Any, answer: str) -> tuple[Any, float]:
    """An answer → what it holds, by the package's own mending of broken JSON, and the score; a ValueError where it is
    no JSON, any LookupError, TypeError or AttributeError where it is another."""
    found = scorer._parse_json_response(answer)
    return found, float(scorer._calculate_crimson(found)["crimson_score"])

"""The application: its deployments bound together, the same on one machine and from a Serve config on a cluster.

`mu2llm serve` runs `application(settings)`; cluster/base/serve.yaml names `mu2llm.serving.app:build` with the same
settings as its arguments.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig, ServeApplicationSchema, ServeDeploySchema

from mu2llm import logs
from mu2llm.errors import UserError
from mu2llm.serving.generator import ReportGenerator
from mu2llm.serving.ingress import Ingress
from mu2llm.serving.reader import VolumeReader
from mu2llm.serving.rollouts import Role, check
from mu2llm.serving.scorer import GreenScorer
from mu2llm.serving.traces import tracing
from mu2llm.settings.green import JudgeConfig
from mu2llm.settings.serving import ReplicasConfig, ServingConfig

NAME = "mu2llm"
IMPORT_PATH = "mu2llm.serving.app:build"
RETRY_AFTER_S = 2.0
ROLLOUTS: dict[Role, str] = {"canary": "CanaryGenerator", "shadow": "ShadowGenerator"}
STATUS_CALLS = 16  # of the ingresses, beside the work: a replica that is full still says that it is there


class Settings(BaseModel):
    """All that the application needs, as plain values that travel."""

    checkpoint: str = "registry://mu2llm@champion"
    tracking: str | None = Field(None, description="URI of the tracking store; None: what each node's environment says")
    loopback: bool = False
    token_sha256: str = Field("", description="of the token of this start; empty: API keys alone open the service")
    serving: ServingConfig = ServingConfig()
    judge: JudgeConfig = JudgeConfig()


def build(args: Settings) -> Application:
    """What a Serve config's import_path names; `args` are the settings, in which $NAME is a variable of the nodes'
    environment. Raises UserError where a roll-out cannot be."""
    settings = Settings.model_validate(expanded(args.model_dump(mode="json")))
    if settings.tracking:
        os.environ["MLFLOW_TRACKING_URI"] = settings.tracking
    check(settings.checkpoint, settings.serving)
    return application(settings)


def expanded(value: Any) -> Any:
    """Plain values with each $NAME replaced by that variable of this process. Raises UserError where there is none."""
    if isinstance(value, dict):
        return {name: expanded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [expanded(each) for each in value]
    if not isinstance(value, str):
        return value
    text = os.path.expandvars(value)
    if missing := re.search(r"\$\{?(\w+)", text):
        raise UserError(f"{value}: the nodes' environment has no {missing[1]}; set it, or write the value itself")
    return text


def application(settings: Settings) -> Application:
    """Ingress → VolumeReader, ReportGenerator, GreenScorer, and a generator of its own for each roll-out."""
    made = deployments(settings)
    serving = settings.serving.model_dump(mode="json")
    rollouts: dict[Role, Any] = {
        role: made[name].bind(serving, settings.tracking, True)  # one that cannot be loaded stops nothing else
        for role, name in ROLLOUTS.items()
        if name in made
    }
    return made["Ingress"].bind(
        made["VolumeReader"].bind(serving),
        made["ReportGenerator"].bind(serving, settings.tracking, settings.loopback),
        made["GreenScorer"].bind(settings.judge.model_dump(mode="json"), settings.serving.scorer.max_ongoing_requests),
        rollouts,
        serving,
        settings.loopback,
        settings.token_sha256,
    )


def deployments(settings: Settings) -> dict[str, Deployment]:
    """By name, with their resources, limits and autoscaling."""
    serving = settings.serving
    beside = serving.generator.model_copy(update={"min_replicas": 1})  # a roll-out begins small and scales alone
    rollouts = {
        name: _deployment(
            *(ReportGenerator, _beside_status(beside), serving), name=name, user_config={"checkpoint": checkpoint}
        )
        for role, name in ROLLOUTS.items()
        if (checkpoint := getattr(serving, role))
    }
    return {
        "Ingress": _deployment(Ingress, serving.ingress, serving, queue=serving.ingress.max_ongoing_requests),
        "VolumeReader": _deployment(VolumeReader, serving.reader, serving),
        "ReportGenerator": _deployment(
            ReportGenerator,
            _beside_status(serving.generator),
            serving,
            user_config={"checkpoint": settings.checkpoint},
        ),
        "GreenScorer": _deployment(
            GreenScorer,
            _beside_status(serving.scorer),
            serving,
            queue=serving.scorer.max_ongoing_requests * serving.scorer.max_replicas,
        ),
        **rollouts,
    }


def cpus(serving: ServingConfig) -> int:
    """That all deployments take at their most replicas: what a Ray of the service's own has to count, lest one waits
    for ever."""
    beside = [serving.generator for role in ROLLOUTS if getattr(serving, role)]
    rooms = [serving.ingress, serving.reader, serving.generator, serving.scorer, *beside]
    return math.ceil(sum(each.cpus * max(each.min_replicas, each.max_replicas) for each in rooms))


def _beside_status(replicas: ReplicasConfig) -> ReplicasConfig:
    return replicas.model_copy(update={"max_ongoing_requests": replicas.max_ongoing_requests + STATUS_CALLS})


def _deployment(
    kind: type, replicas: ReplicasConfig, serving: ServingConfig, queue: int = -1, **options: Any
) -> Deployment:
    scaling = AutoscalingConfig(
        min_replicas=replicas.min_replicas,
        max_replicas=max(replicas.min_replicas, replicas.max_replicas),
        initial_replicas=replicas.min_replicas,
        target_ongoing_requests=replicas.target_ongoing_requests,
        upscale_delay_s=replicas.upscale_delay_s,
        downscale_delay_s=replicas.downscale_delay_s,
    )
    return serve.deployment(
        autoscaling_config=scaling,
        ray_actor_options=_resources(replicas),
        max_ongoing_requests=replicas.max_ongoing_requests,
        max_surge_percent=100,  # an old replica serves until the one that replaces it is ready
        max_queued_requests=queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=serving.drain_seconds,
        logging_config=log_lines(),
        **options,
    )(kind)


def log_lines() -> LoggingConfig:
    """No line a request, where the proxy would write the id that a client sent (issue 22); JSON where asked for."""
    return LoggingConfig(enable_access_log=False, encoding="JSON" if logs.as_json() else "TEXT")


def _resources(replicas: ReplicasConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus}
    if replicas.memory_gib:
        options["memory"] = int(replicas.memory_gib * 2**30)
    if replicas.labels:
        options["label_selector"] = replicas.labels
    return options


def serve_config(settings: Settings, port: int = 8000) -> dict[str, Any]:
    """The Serve config of the same application, checked by Ray's own schema. Its arguments are all it says: what a
    deployment is given follows from them in `deployments`, so no number stands in it twice."""
    checked = ServeDeploySchema(
        proxy_location="EveryNode",
        http_options={"host": "0.0.0.0", "port": port},
        logging_config=log_lines(),
        tracing_config=tracing(settings.serving.traces) if settings.serving.traces else None,
        applications=[
            ServeApplicationSchema(
                name=NAME,
                route_prefix="/",
                import_path=IMPORT_PATH,
                args=settings.model_dump(mode="json", exclude_defaults=True) | {"loopback": False},
            )
        ],
    )
    return checked.model_dump(mode="json", exclude_unset=True)

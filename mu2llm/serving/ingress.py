"""`Ingress`: HTTP, validation, limits, authentication, jobs. No model."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from mu2llm.serving import web
from mu2llm.serving.jobs import Jobs
from mu2llm.serving.keys import Doorkeeper
from mu2llm.serving.service import Service
from mu2llm.settings.serving import ServingConfig


@serve.ingress()
class Ingress:
    """`loopback` says that only this machine can reach it: then keys are off unless they are asked for."""

    def __init__(
        self,
        reader: DeploymentHandle,
        generator: DeploymentHandle,
        scorer: DeploymentHandle,
        settings: dict[str, Any],
        loopback: bool,
    ) -> None:
        self.settings, self.loopback = ServingConfig.model_validate(settings), loopback
        self.service = Service(reader, generator, scorer, self.settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        needed = keys_needed(self.settings, self.loopback)
        doorkeeper = Doorkeeper(self.settings.state, needed)
        return web.application(self.service, Jobs(self.service), doorkeeper, self.loopback)


def keys_needed(settings: ServingConfig, loopback: bool) -> bool:
    return settings.authentication == "on" or (settings.authentication == "auto" and not loopback)

"""`Ingress`: HTTP, validation, limits, authentication, jobs. No model."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from mu2llm import logs
from mu2llm.serving import web
from mu2llm.serving.jobs import Jobs
from mu2llm.serving.keys import Doorkeeper
from mu2llm.serving.rollouts import Role
from mu2llm.serving.service import Service
from mu2llm.settings.serving import ServingConfig


@serve.ingress()
class Ingress:
    """`loopback` says that it listens to this machine alone; `token_sha256` is of the token that opens everything."""

    def __init__(
        self,
        reader: DeploymentHandle,
        generator: DeploymentHandle,
        scorer: DeploymentHandle,
        rollouts: dict[Role, DeploymentHandle],
        settings: dict[str, Any],
        loopback: bool,
        token_sha256: str,
    ) -> None:
        logs.withhold()
        self.token_sha256 = token_sha256
        self.settings, self.loopback = ServingConfig.model_validate(settings), loopback
        self.service = Service(reader, generator, scorer, self.settings, rollouts)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        needed = self.settings.authentication != "off"
        doorkeeper = Doorkeeper(self.settings.state, needed, self.token_sha256)
        return web.application(self.service, Jobs(self.service), doorkeeper, self.loopback)

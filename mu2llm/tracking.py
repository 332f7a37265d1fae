"""MLflow behind one small door: a run a stage, the model registry and its alias `champion`."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from mu2llm.records import Checkpoint

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)
EXPERIMENT, MODEL = "mu2llm", "mu2llm"
PACKAGES = ("mu2llm", "ray", "torch", "transformers", "trl", "peft", "monai", "pyarrow")


def store() -> str:
    """The tracking store: `MLFLOW_TRACKING_URI`, else SQLite at `mu2llm.db` in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mu2llm.db').resolve()}"


@functools.cache
def _client(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient  # seconds of imports: only where something is tracked

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class StageRun(BaseModel):
    """A run in the store, as plain values that travel to the process that logs."""

    store: str
    run_id: str

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Logs numbers at a step. A store that is down costs a warning, never the training."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(time.time() * 1000)
        try:
            _client(self.store).log_batch(self.run_id, [Metric(k, float(v), now, step) for k, v in metrics.items()])
        except MlflowException as error:
            logger.warning(
                "tracking store %s: %s metrics at step %s not logged: %s", self.store, len(metrics), step, error
            )


def start_stage(name: str, parameters: dict[str, Any], tags: dict[str, str]) -> StageRun:
    """Opens a run for a stage: its resolved configuration as parameters, its lineage as tags."""
    client = _client(store())
    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    run = client.create_run(experiment_id, run_name=name, tags={"stage": name, **tags})
    for key, value in _flat(parameters).items():
        client.log_param(run.info.run_id, key, str(value)[:500])
    return StageRun(store=store(), run_id=run.info.run_id)


def end_stage(run: StageRun, tags: dict[str, str], status: str = "FINISHED") -> None:
    client = _client(run.store)
    for key, value in tags.items():
        client.set_tag(run.run_id, key, value)
    client.set_terminated(run.run_id, status)


def register(
    checkpoint: Checkpoint, run: StageRun | None = None, alias: str | None = None, tags: dict[str, str] | None = None
) -> str:
    """Registers a checkpoint as a version of the model `mu2llm`, under an alias if one is given; its version."""
    client = _client(run.store if run else store())
    if not any(model.name == MODEL for model in client.search_registered_models()):
        client.create_registered_model(MODEL)
    entry = client.create_model_version(
        MODEL,
        source=Path(checkpoint.uri).resolve().as_uri() if "://" not in checkpoint.uri else checkpoint.uri,
        run_id=run.run_id if run else None,
        tags={"checkpoint": checkpoint.uri, "spec": checkpoint.lineage.spec_hash, **(tags or {})},
    )
    if alias:
        client.set_registered_model_alias(MODEL, alias, entry.version)
    return str(entry.version)


def tags(stage: str) -> list[dict[str, str]]:
    """The tags of all tracked runs of a stage, newest first."""
    client = _client(store())
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found: list[dict[str, str]] = []
    token: str | None = ""
    while experiment and token is not None:
        page = client.search_runs(
            [experiment.experiment_id],
            f"tags.stage = '{stage}'",
            order_by=["start_time DESC"],
            page_token=token or None,
        )
        found += [dict(run.data.tags) for run in page]
        token = page.token or None
    return found


def version_of(alias: str) -> str | None:
    """The version of the model `mu2llm` that an alias names now; None where none has it."""
    from mlflow.exceptions import MlflowException

    try:
        return str(_client(store()).get_model_version_by_alias(MODEL, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def version_tags(version: str) -> dict[str, str]:
    return dict(_client(store()).get_model_version(MODEL, version).tags)


def set_alias(alias: str, version: str) -> None:
    _client(store()).set_registered_model_alias(MODEL, alias, version)


def registered(alias: str = "champion") -> str:
    """The URI of the checkpoint that an alias names; a LookupError where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return str(_client(store()).get_model_version_by_alias(MODEL, alias).tags["checkpoint"])
    except MlflowException as error:
        raise LookupError(f"{store()} has no {MODEL}@{alias}") from error


def git_commit() -> str | None:
    """The commit of the working directory's repository, with -dirty where it has changes; None outside one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat

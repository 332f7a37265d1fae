"""The model registry: versions of the model `mu2llm`, and the aliases `champion` and `challenger` that name one."""

from __future__ import annotations

import logging
import socket
from typing import Literal

from mu2llm import storage
from mu2llm.artefacts import open_checkpoint, weights_of
from mu2llm.errors import UserError
from mu2llm.records import Checkpoint
from mu2llm.tracking.client import MODEL, is_server, reachable, shown, store

Alias = Literal["champion", "challenger"]
SCHEME = "registry://"
logger = logging.getLogger(__name__)


def locate(uri: str) -> str:
    """The checkpoint's own URI: of `registry://mu2llm@champion` or `registry://mu2llm/3`; any other as it is.

    Raises UserError where the registry has no such alias or version.
    """
    if not uri.startswith(SCHEME):
        return uri
    name = uri.removeprefix(SCHEME)
    model, alias, version = name.partition("@")[0].partition("/")[0], name.partition("@")[2], name.partition("/")[2]
    if model != MODEL or bool(alias) == bool(version):
        raise UserError(f"{uri}: expected {SCHEME}{MODEL}@ALIAS or {SCHEME}{MODEL}/VERSION")
    if alias:
        try:
            return registered(alias)
        except LookupError as error:
            raise UserError(f"{error}; mu2llm promote gives a checkpoint the alias") from None
    return _numbered(version)


def register(
    checkpoint: Checkpoint, run_id: str | None = None, alias: str | None = None, tags: dict[str, str] | None = None
) -> str:
    """Registers a checkpoint as a version of the model `mu2llm`, under an alias if one is given; its version."""
    client = reachable()
    _create_model()
    uri = storage.absolute(storage.lasting(checkpoint.uri))
    entry = client.create_model_version(
        MODEL,
        source=uri if "://" in uri else _local(uri),
        run_id=run_id,
        tags={
            **{"checkpoint": uri, "spec": checkpoint.lineage.spec_hash},
            **{"weights": weights_of(checkpoint).weights, **(tags or {})},
        },
    )
    if alias:
        client.set_registered_model_alias(MODEL, alias, entry.version)
    return str(entry.version)


def _local(path: str) -> str:
    """A local path as a version's source. A server takes no local files: it is told which machine has it."""
    return f"mu2llm://{socket.gethostname()}{path}" if is_server(store()) else f"file://{path}"


def version_of(alias: str) -> str | None:
    """The version of the model `mu2llm` that an alias names now; None where none has it."""
    from mlflow.exceptions import MlflowException

    try:
        return str(reachable().get_model_version_by_alias(MODEL, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def version_tags(version: str) -> dict[str, str]:
    return dict(reachable().get_model_version(MODEL, version).tags)


def set_alias(alias: str, version: str) -> None:
    reachable().set_registered_model_alias(MODEL, alias, version)


def release(uri: str) -> list[str]:
    """Takes the aliases from a checkpoint that is to go: what takes its place does not get them. Which there were."""
    gone = storage.absolute(storage.lasting(uri))
    names = [alias for alias, named in aliases().items() if named == gone]
    for alias in names:
        reachable().delete_registered_model_alias(MODEL, alias)
        logger.warning("%s is removed: nothing is %s@%s any more", uri, MODEL, alias)
    return names


def aliases() -> dict[str, str]:
    """Alias → URI of the checkpoint that it names, for those that somebody has."""
    named = {alias: version_of(alias) for alias in ("champion", "challenger")}
    return {alias: version_tags(version)["checkpoint"] for alias, version in named.items() if version}


def registered(alias: str = "champion") -> str:
    """The URI of the checkpoint that an alias names; a LookupError where there is none, a UserError where other
    weights than the registered ones lie there."""
    version = version_of(alias)
    if version is None:
        raise LookupError(f"{shown(store())} has no {MODEL}@{alias}")
    return source(version)


def source(version: str) -> str:
    """The URI of a version's checkpoint; a UserError where other weights than the registered ones lie there."""
    tags = version_tags(version)
    uri = tags["checkpoint"]
    if tags.get("weights") and storage.exists(storage.join(uri, Checkpoint.FILE)):
        now = weights_of(open_checkpoint(uri)).weights
        if now != tags["weights"]:
            raise UserError(
                f"version {version} of {MODEL} was registered with weights {tags['weights'][:12]}, {uri} holds "
                f"{now[:12]} now: promote it anew (mu2llm promote {uri})"
            )
    return uri


def checkpoints() -> set[str]:
    """The URIs of all registered versions, whether or not an alias names them."""
    client, found, token = reachable(), set(), None
    while True:
        page = client.search_model_versions(f"name = '{MODEL}'", page_token=token)
        found |= {version.tags["checkpoint"] for version in page if "checkpoint" in version.tags}
        token = page.token
        if not token:
            return found


def _numbered(version: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return source(version)
    except MlflowException:
        raise UserError(f"{shown(store())} has no version {version} of {MODEL}; see mu2llm runs list") from None


def _create_model() -> None:
    from mlflow.exceptions import MlflowException

    client = reachable()
    try:
        client.get_registered_model(MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(MODEL)

"""The service: serve, serve-config, key."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from typing import Annotated, Any

import typer
import yaml

from mu2llm import config, storage, tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.cli.app import Address, DryRun, Json, Preset, Set, app, console, dry_run, show
from mu2llm.errors import UserError
from mu2llm.settings.serving import ServingConfig

TOKEN = "MU2LLM_SERVE_TOKEN"  # instead of a new token at every start
CHAMPION = f"registry://{tracking.MODEL}@champion"
STATE = ServingConfig().state
CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", help="Checkpoint that writes; default the registry's champion.")
]


@app.command()
def serve(
    checkpoint: CheckpointOption = CHAMPION,
    host: Annotated[str, typer.Option(help="Address to listen at; loopback: this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    address: Address = None,
    dry: DryRun = False,
) -> None:
    """Serve reports over HTTP until interrupted; /docs describes the API, / is the reading room."""
    experiment = config.load(preset, set_)
    if dry:
        reads = [uri for uri in (checkpoint, experiment.serving.canary, experiment.serving.shadow) if uri]
        dry_run(experiment, reads, [experiment.serving.state], f"port {port} of {host}")
    _check_checkpoint(checkpoint)
    from mu2llm import cluster
    from mu2llm.serving.app import cpus
    from mu2llm.serving.keys import hash_of
    from mu2llm.serving.running import check, running, watch

    settings, opening = _settings(experiment, checkpoint, host), ""
    if experiment.serving.authentication == "auto":
        token = os.environ.get(TOKEN) or secrets.token_urlsafe(32)
        settings = settings.model_copy(update={"token_sha256": hash_of(token)})
        opening = f"/#token={token}"
    check(settings, host, port)
    least = max(cpus(settings.serving), os.cpu_count() or 1)
    with cluster.session(address, cpus=least), running(settings, host, port) as url:
        for each in (signal.SIGTERM, signal.SIGINT):  # behind Ray's own; what has begun is finished
            signal.signal(each, lambda *_: sys.exit(0))
        told = f"{url}{opening}  (API: {url}/docs, ready when {url}/readyz says so; Ctrl-C ends it)"
        console.print(told, highlight=False, soft_wrap=True)
        watch()


@app.command("serve-config")
def serve_config(
    checkpoint: CheckpointOption = CHAMPION,
    port: int = 8000,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
) -> None:
    """Print the Serve config of the same application for a cluster: `serve deploy`, or a RayService."""
    from mu2llm.serving.app import serve_config as describe

    settings = _settings(config.load(preset, set_), checkpoint, "0.0.0.0")
    print("# mu2llm serve-config writes this file; the settings are under args")
    print(yaml.safe_dump(describe(settings, port=port), sort_keys=False), end="")


def _check_checkpoint(checkpoint: str) -> None:
    """Says at once what the service would only say in its readiness."""

    if checkpoint.startswith("registry://"):
        try:
            tracking.registered(checkpoint.rpartition("@")[2])
        except LookupError as error:
            raise UserError(f"{error}: promote a checkpoint (mu2llm promote), or name one by --checkpoint") from None
    else:
        open_checkpoint(checkpoint)


def _settings(experiment: config.Experiment, checkpoint: str, host: str) -> Any:
    from mu2llm.serving.app import Settings
    from mu2llm.serving.guard import is_loopback

    serving, store = experiment.serving, tracking.store()
    rollouts = {role: uri and _place(uri) for role, uri in (("canary", serving.canary), ("shadow", serving.shadow))}
    return Settings(
        checkpoint=_place(checkpoint),
        tracking=store if store == tracking.shown(store) else None,  # a password stays in the environment
        loopback=is_loopback(host),
        serving=serving.model_copy(update={"state": storage.absolute(serving.state), **rollouts}),
        judge=experiment.judge,
    )


def _place(checkpoint: str) -> str:
    """What names it on any node."""
    return checkpoint if checkpoint.startswith("registry://") else storage.absolute(checkpoint)


key_app = typer.Typer(no_args_is_help=True, help="API keys of the service.")
app.add_typer(key_app, name="key")
State = Annotated[str, typer.Option("--state", help="URI under which the service keeps its state (serving.state).")]


@key_app.command("make")
def key_make(
    name: Annotated[str, typer.Option(help="Whom it is for.")],
    scope: Annotated[list[str], typer.Option(help="read, score or correct; repeatable.")] = ["read"],  # noqa: B006
    state: State = STATE,
    as_json: Json = False,
) -> None:
    """Make an API key; it is shown once, and only its hash is stored."""
    from mu2llm.serving.keys import make_key

    show({"key": make_key(state, name, tuple(scope)), "name": name, "scopes": scope}, as_json)


@key_app.command("list")
def key_list(state: State = STATE, as_json: Json = False) -> None:
    """The keys there are, without what they are."""
    from mu2llm.serving.keys import list_keys

    show({key.id: key.model_dump(exclude={"id", "sha256"}) for key in list_keys(state)}, as_json)


@key_app.command("revoke")
def key_revoke(
    identity: Annotated[str, typer.Argument(help="Its id, as `key list` shows it.")],
    state: State = STATE,
    as_json: Json = False,
) -> None:
    """Take a key away; the service refuses it within seconds."""
    from mu2llm.serving.keys import revoke_key

    revoke_key(state, identity)
    show({"revoked": identity}, as_json)


@app.command()
def audit(
    state: State = STATE,
    day: Annotated[str, typer.Option(help="One day only, such as 2026-11-28 (UTC).")] = "",
    as_json: Json = False,
) -> None:
    """Who did what at the service: its audit log, in the order of time."""
    from mu2llm.serving.audit import entries

    found = [entry.model_dump() for entry in entries(state, day)]
    if as_json:
        show(found, as_json)
        return
    for entry in found:
        print(*(value or "-" for name, value in entry.items() if name != "id"))


@app.command()
def shadow(state: State = STATE, as_json: Json = False) -> None:
    """What a shadow (serving.shadow) said otherwise than the reports that were shown."""
    from mu2llm.serving.comparisons import summaries

    for each in summaries(state):
        show(each, as_json)

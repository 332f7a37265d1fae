"""Configuration and models: config show, convert, model summary, promote."""

from __future__ import annotations

import json
from typing import Annotated, cast

import typer
import yaml

from mu2llm import config
from mu2llm.cli.app import Address, Data, Json, Out, Preset, Set, app, checkpoint_place, show, work_on_ray
from mu2llm.errors import UserError
from mu2llm.progress import counted

config_app = typer.Typer(no_args_is_help=True, help="The configuration.")
app.add_typer(config_app, name="config")


@config_app.command("show")
def config_show(preset: Preset = "demo", set_: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Print the resolved configuration."""
    values = config.load(preset, set_).model_dump(mode="json")
    print(json.dumps(values) if as_json else yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


convert_app = typer.Typer(no_args_is_help=True, help="Checkpoints of other programs.")
app.add_typer(convert_app, name="convert")


@convert_app.command("reference")
def convert_reference(
    directory: Annotated[str, typer.Argument(help="Folder of a published checkpoint.")], out: Out, as_json: Json = False
) -> None:
    """A checkpoint in the published layout → ours; exits 1 where keys are missing or left over."""
    from mu2llm.model import convert

    show(convert.convert_reference(directory, out), as_json)


model_app = typer.Typer(no_args_is_help=True, help="The model.")
app.add_typer(model_app, name="model")


@model_app.command("summary")
def model_summary(preset: Preset = "paper", set_: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Shapes at every step, parameters by part, memory and FLOPs for one scan."""
    from mu2llm.model.summary import summarise

    experiment = config.load(preset, set_)
    summary = summarise(experiment.model, experiment.data.spec)
    print(json.dumps(summary.as_dict()) if as_json else summary)


@model_app.command("probe")
def model_probe(
    data: Data,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", parser=checkpoint_place, metavar="URI", help="A checkpoint of any stage, or"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="published weights of the tower that the data were ingested for.")
    ] = None,
    set_: Set = [],  # noqa: B006
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Linear probe of a vision encoder: AUROC and F1 of the 18 labels, and the effective rank of its features."""
    if bool(checkpoint) == bool(weights) or (checkpoint and set_):
        raise UserError("give a --checkpoint, or the --weights of a tower (and --set to change it)")
    from mu2llm.cases import Shards
    from mu2llm.evaluation.probe import probe
    from mu2llm.stages import tower

    with work_on_ray(address) as bars:
        probed = checkpoint or tower.of_weights(Shards.open(data), str(weights), set_)
        found = probe(probed, data, counted(bars, "encode"))
    show(found.model_dump(), as_json)


@app.command()
def promote(
    checkpoint: Annotated[str | None, typer.Argument(help="Checkpoint of stage sft or dpo.")] = None,
    alias: Annotated[str, typer.Option(help="champion, which the service takes, or challenger")] = "champion",
    force: Annotated[bool, typer.Option("--force", help="Also without an evaluation or with a red line.")] = False,
    back: Annotated[bool, typer.Option("--back", help="Give the alias back to the version before.")] = False,
    as_json: Json = False,
) -> None:
    """Give a checkpoint the registry's alias after its evaluation, audits and spec; write its model card."""
    if alias not in ("champion", "challenger"):
        raise UserError(f"--alias {alias}: expected champion or challenger")
    if bool(checkpoint) == back:
        raise UserError("give a checkpoint, or --back to return to the one before")
    from mu2llm.evaluation import promotion

    if checkpoint:
        promoted = promotion.promote(checkpoint, cast(promotion.Alias, alias), force)
    else:
        promoted = promotion.go_back(cast(promotion.Alias, alias))
    show(promoted.model_dump(), as_json)

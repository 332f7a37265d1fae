"""Vision towers: towers list, towers check."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from mu2llm.cli.app import Json, Preset, Set, app, result_alone_on_stdout, result_console, show
from mu2llm.errors import Failure

towers_app = typer.Typer(no_args_is_help=True, help="Vision towers: the field's open encoders, and one's own.")
app.add_typer(towers_app, name="towers")


@towers_app.command("list")
def towers_list(as_json: Json = False) -> None:
    """The towers by name: licence, input, output, and whether this machine has their weights."""
    from mu2llm.model.towers import check

    rows = check.listed()
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("name", "licence", "input", "output", "weights")
    for row in rows:
        output = f"{'×'.join(map(str, row['output']['grid']))} of {row['output']['width']}"
        here = row["weights"]["here"] or row["weights"]["source"]
        table.add_row(row["name"], row["licence"], row["input"], output, here)
    result_console().print(table)


@towers_app.command("check")
def towers_check(
    name: Annotated[str, typer.Argument(help="m3d, colipri, ct_fm, merlin, spectre or own")],
    weights: Annotated[str, typer.Option("--weights", help="File or folder by path, s3:// or hub name.")],
    preset: Preset = "paper",
    set_: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Load weights into a tower, encode one phantom, and say what came of it; exits 1 where names do not fit."""
    from mu2llm.model.towers import check

    with result_alone_on_stdout():
        found = check.check(name, weights, preset, set_)
    show(found.model_dump(), as_json)
    if found.missing or found.unused:
        raise Failure(
            f"{weights}: {len(found.missing)} names of tower {name} have no weights, {len(found.unused)} no place"
        )

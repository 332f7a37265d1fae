"""What others take: export vlm3d, radmatch, lm, grand-challenge."""

from __future__ import annotations

from typing import Annotated

import typer

from mu2llm.cli.app import CheckpointUri, Fresh, Json, Out, app, result_alone_on_stdout, show

export_app = typer.Typer(no_args_is_help=True, help="What challenges, other judges and other servers take.")
app.add_typer(export_app, name="export")

Predictions = Annotated[
    str, typer.Option(help="What `score` reads, what `generate --json` printed, or a folder of `evaluate`.")
]
Run = Annotated[str | None, typer.Option(help="Which run of a folder of `evaluate`; default: the last.")]


@export_app.command("vlm3d")
def export_vlm3d(
    predictions: Predictions, out: Out, run: Run = None, fresh: Fresh = False, as_json: Json = False
) -> None:
    """Reports as the VLM3D challenge's results.json."""
    from mu2llm.evaluation.exports.reports import vlm3d

    show(vlm3d(predictions, out, run, fresh), as_json)


@export_app.command("radmatch")
def export_radmatch(
    predictions: Predictions,
    references: Annotated[str, typer.Option(help="The same, or shards that `ingest` wrote.")],
    out: Out,
    split: Annotated[str | None, typer.Option(help="Of shards, or one of CT-RATE's: ct-rate-valid …")] = None,
    run: Run = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Reports as RadMatch's two folders of texts, paired by name."""
    from mu2llm.evaluation.exports.reports import radmatch

    show(radmatch(predictions, references, out, split, run, fresh), as_json)


@export_app.command("lm")
def export_lm(checkpoint: CheckpointUri, out: Out, fresh: Fresh = False, as_json: Json = False) -> None:
    """The language model alone, as a plain causal model of transformers that vLLM loads."""
    from mu2llm.evaluation.exports.language_model import language_model

    with result_alone_on_stdout():
        result = language_model(checkpoint, out, fresh)
    show(result, as_json)


@export_app.command("grand-challenge")
def export_grand_challenge(
    checkpoint: CheckpointUri,
    out: Out,
    input_socket: Annotated[str, typer.Option(help="Slug of the phase's input image.")] = "ct-image",
    input_path: Annotated[str, typer.Option(help="Where that socket's image lies below /input.")] = "images/ct",
    output_path: Annotated[str, typer.Option(help="Where the report's socket lies below /output.")] = "report.json",
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """An algorithm for Grand-Challenge: image, model, entry point, test scripts."""
    from mu2llm.evaluation.exports.grand_challenge import grand_challenge

    with result_alone_on_stdout():
        result = grand_challenge(checkpoint, out, input_socket, input_path, output_path, fresh)
    show(result, as_json)

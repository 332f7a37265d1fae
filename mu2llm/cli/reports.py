"""Reports and what they are worth: evaluate, score, generate, green, labels."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mu2llm import config
from mu2llm.artefacts import open_checkpoint
from mu2llm.cli.app import (
    Accept,
    Address,
    CheckpointUri,
    Data,
    DryRun,
    Format,
    Fresh,
    Json,
    JudgeName,
    Out,
    Preset,
    Set,
    app,
    console,
    dry_run,
    load_with_judge,
    print_scan,
    progress_bars,
    result_console,
    show,
    work_on_ray,
)
from mu2llm.errors import UserError
from mu2llm.progress import counted
from mu2llm.settings.green import NAMES as JUDGES


@app.command()
def evaluate(
    checkpoint: CheckpointUri,
    data: Data,
    out: Out,
    split: Annotated[str, typer.Option(help="train, validation, test, or CT-RATE's ct-rate-valid …")] = "test",
    judge: JudgeName = None,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    address: Address = None,
    fresh: Fresh = False,
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the reports of a split and score them: metrics with intervals, audits, report.html."""
    experiment = load_with_judge(preset, set_, judge)
    if dry:
        dry_run(experiment, [checkpoint, data], [out], f"judge {experiment.judge.name}")
    from mu2llm.evaluation import evaluate as evaluation

    with work_on_ray(address) as bars:
        result = evaluation.evaluate(checkpoint, data, out, experiment, split, counted(bars, "evaluate"), fresh)
    show(result, as_json)


@app.command()
def score(
    predictions: Annotated[str, typer.Option(help="CSV, JSON lines, Parquet, results.json or a folder of <id>.txt.")],
    references: Annotated[str, typer.Option(help="The same, or shards that `ingest` wrote.")],
    out: Out,
    split: Annotated[str | None, typer.Option(help="Of shards, or one of CT-RATE's: ct-rate-valid …")] = None,
    train: Annotated[str | None, typer.Option(help="Training reports for the floors; shards have their own.")] = None,
    name: Annotated[str | None, typer.Option(help="How tables call the run; default: the file's name.")] = None,
    bert_score: Annotated[bool, typer.Option("--bert-score", help="BERTScore too, which needs an encoder.")] = False,
    external: Annotated[
        list[str], typer.Option(metavar="NAME=COMMAND", help="A metric of another program, by JSON lines; repeatable.")
    ] = [],  # noqa: B006
    judge: JudgeName = None,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    fresh: Fresh = False,
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    """Score anyone's reports: joined by id, with floors, intervals and report.html. No model, no scans."""
    from mu2llm.evaluation.external import parsed

    encoder = [] if bert_score else ["evaluation.text_encoder=none"]
    experiment = load_with_judge(preset, [*encoder, *set_], judge)
    others = {**experiment.evaluation.external, **parsed(external)}
    evaluation = experiment.evaluation.model_copy(update={"external": others})
    experiment = experiment.model_copy(update={"evaluation": evaluation})
    if dry:
        dry_run(experiment, [predictions, references], [out], f"judge {experiment.judge.name}")
    from mu2llm.evaluation.leaderboard import rows, terminal
    from mu2llm.evaluation.score import score as score_reports
    from mu2llm.evaluation.score import summary

    results = score_reports(predictions, references, out, experiment, split, train, name, fresh)
    if as_json:
        show(summary(results), as_json)
        return
    result_console().print(*terminal(rows(results)))


@app.command()
def rescore(
    evaluation: Annotated[str, typer.Argument(help="Folder that `evaluate` wrote.")],
    judge: JudgeName = None,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Score saved predictions anew, by another judge or with other settings: needs neither model nor scans."""
    experiment = load_with_judge(preset, set_, judge)
    from mu2llm.evaluation.evaluate import rescore as score_anew

    results = score_anew(evaluation, experiment)
    runs = {run: results.summary(run) for run in results.header.checkpoints}
    if as_json:
        show(runs, as_json)
        return
    from mu2llm.evaluation.leaderboard import rows, terminal

    result_console().print(*terminal(rows(results)))


@app.command()
def compare(
    evaluations: Annotated[list[str], typer.Argument(metavar="EVALUATION EVALUATION…", help="Folders of `evaluate`.")],
    out: Out,
    common: Annotated[bool, typer.Option("--common", help="Of different cases: those that all have.")] = False,
    judge: JudgeName = None,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Evaluations of the same cases side by side, with paired differences of later ones to earlier; no model."""
    if len(evaluations) < 2:
        raise UserError("give two evaluations or more to compare")
    experiment = load_with_judge(preset, set_, judge)
    from mu2llm.evaluation.evaluate import compare_saved
    from mu2llm.evaluation.leaderboard import differences, rows, terminal

    results = compare_saved(evaluations, out, experiment, common)
    if as_json:
        runs = {run: results.summary(run) for run in results.header.checkpoints}
        show({"runs": runs, "differences": [each.model_dump() for each in results.differences]}, as_json)
        return
    result_console().print(*terminal(rows(results)), differences(results))


@app.command()
def leaderboard(
    html: Annotated[Path | None, typer.Option(help="Write a page too.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown too.")] = None,
    paper: Annotated[bool, typer.Option(help="Show what the paper and others published below.")] = True,
    as_json: Json = False,
) -> None:
    """All evaluations in the tracking store as one table; like is ranked with like."""
    from mu2llm import tracking
    from mu2llm.evaluation import leaderboard as board
    from mu2llm.evaluation import leaderboard_page as page

    ours = board.tracked(tracking.tags("evaluate"))
    table = [*ours, *(board.paper() if paper else [])]
    for path, text in ((html, page.html), (markdown, board.markdown)):
        if path:
            path.write_text(text(table), encoding="utf-8")
    if as_json:
        show(
            {"store": tracking.shown(tracking.store()), "rows": [row.model_dump(mode="json") for row in table]}, as_json
        )
        return
    result_console().print(*board.terminal(table))
    if not ours:
        console.print(f"{tracking.shown(tracking.store())} has no evaluations yet: mu2llm evaluate writes there")


@app.command()
def generate(
    checkpoint: CheckpointUri,
    paths: Annotated[list[str] | None, typer.Argument(help="Examinations: file, DICOM folder, zip or URI.")] = None,
    manifest: Annotated[str | None, typer.Option(help="A manifest of scans instead of paths.")] = None,
    volumes: Annotated[str, typer.Option(help="Root of the manifest's relative paths.")] = ".",
    format: Format = "jsonl",
    series: Annotated[
        list[str],
        typer.Option(
            help="DICOM series to read, by instance UID or description; repeatable where the model reads several."
        ),
    ] = [],  # noqa: B006
    accept: Accept = [],  # noqa: B006
    set_: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Scans → reports."""
    from mu2llm.cases import read_manifest
    from mu2llm.engine.scans import ScanPlace, report_scans
    from mu2llm.model import familiarity

    experiment = config.override(open_checkpoint(checkpoint).experiment, set_)
    scans, refused = [ScanPlace.given(path, series) for path in paths or []], []
    if manifest:
        table = read_manifest(manifest, format, volumes, experiment.data, need_report=False)
        scans += [ScanPlace.of(case, experiment.data.together) for case in table.cases]
        refused = [{"path": each.uri, "rejected": each.reason, "message": each.message} for each in table.rejections]
    if not scans and not refused:
        raise UserError("no scans: give paths, or --manifest")
    with progress_bars() as bars:
        entries = report_scans(checkpoint, scans, experiment.evaluation, tuple(accept), counted(bars, "generate"))
    entries += refused
    if as_json:
        print(json.dumps(entries))
        return
    for entry in entries:
        report = entry.get("report")
        if report is None:
            print_scan(entry["path"], entry["message"], "red")
            continue
        known = entry.get("familiarity")
        said = familiarity.describe(known["percentile"] if known else None)
        print_scan(f"{entry['path']}: {said}" if said else entry["path"], report)


green_app = typer.Typer(no_args_is_help=True, help="The GREEN score.")
app.add_typer(green_app, name="green")


@green_app.command("score")
def green_score(
    pairs: Annotated[Path, typer.Option(help="JSON lines of {reference, candidate}.")],
    judge: Annotated[str, typer.Option(help=JUDGES)] = "rules",
    set_: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Judge pairs of reports."""
    from mu2llm.green import load_judge
    from mu2llm.green.scoring import score_lines

    experiment = config.load("demo", [*set_, f"judge.name={judge}"])
    if not pairs.is_file():
        raise UserError(f"--pairs {pairs}: there is no such file")
    with pairs.open(encoding="utf-8") as lines:
        result = score_lines(lines, load_judge(experiment.judge))
    show(result, as_json)


@green_app.command("parse")
def green_parse(as_json: Json = False) -> None:
    """A judge's answers, JSON lines of {text} on stdin, → counts and scores."""
    from mu2llm.green.scoring import parse_lines

    print(json.dumps(parse_lines(sys.stdin), indent=None if as_json else 1))


@app.command()
def labels(as_json: Json = False) -> None:
    """The 18 CT-RATE labels of reports, JSON lines of {text} on stdin."""
    from mu2llm.green.scoring import label_lines

    print(json.dumps(label_lines(sys.stdin), indent=None if as_json else 1))

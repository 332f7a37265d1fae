"""The command line. A command is a few lines that call the package; its JSON goes to stdout and nothing else does.

Exit codes: 0 done, 1 a failure, 2 the user's mistake; one line says what is wrong and what to do. `--debug`
(or MU2LLM_DEBUG=1) shows the traceback instead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import mu2llm
from mu2llm import config
from mu2llm.errors import Failure, UserError
from mu2llm.records import Rejection

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=mu2llm.__doc__)
console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be read, written and needed; do nothing.")]
Preset = Annotated[str, typer.Option("--preset", help="Name of a preset or path of a YAML file.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as dpo.beta=0.2.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to join; default RAY_ADDRESS, else one of its own.")
]
Out = Annotated[str, typer.Option("--out", help="Where to write: a local path, s3:// or gs://.")]
Data = Annotated[str, typer.Option("--data", help="URI of the shards that `ingest` wrote.")]


def main() -> None:
    """The console script: runs the app and turns what went wrong into one line and an exit code."""
    debug = "--debug" in sys.argv or bool(os.environ.get("MU2LLM_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app(standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        code, line = explain(error)
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(code)
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is kept, run the same command again to go on", style="red")
        sys.exit(130)


def explain(error: BaseException) -> tuple[int, str]:
    """What went wrong → (exit code, one line); what a Ray task raised is told as if it had been raised here."""
    error = _reason(error)
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, Rejection):
        return 1, str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            1,
            f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command again",
        )
    if isinstance(error, Failure):
        return 1, str(error)
    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
        return 2, f"{error.format_message()}; see mu2llm --help"
    first = str(error).strip().splitlines() or [""]
    return 1, f"{type(error).__name__}: {first[0]} (--debug shows where)"


def _reason(error: BaseException) -> BaseException:
    """The first error of ours in a chain of causes, else the deepest one where Ray wrapped it."""
    chain = [error]
    while (cause := getattr(chain[-1], "cause", None) or chain[-1].__cause__) and cause not in chain:
        chain.append(cause)
    # Ray's wrapper of an error is an instance of that error's class too
    told = [each for each in chain if not type(each).__module__.startswith("ray.")] or chain[-1:]
    ours = [each for each in told if isinstance(each, UserError | Failure | Rejection)]
    return ours[0] if ours else told[-1] if told[0] is not error else error


def show(value: Any, as_json: bool) -> None:
    """A result: as JSON on stdout, or as a table for people."""
    if as_json:
        print(json.dumps(value, default=str))
        return
    table = Table(show_header=False, box=None)
    for key, item in value.items():
        table.add_row(str(key), json.dumps(item, default=str) if isinstance(item, dict | list) else str(item))
    Console().print(table)


def dry_run(experiment: config.Experiment, reads: list[str], writes: list[str], needs: str) -> NoReturn:
    """What `--dry-run` prints: the resolved configuration, inputs, outputs, resources; then the command ends."""
    plan = {"reads": reads, "writes": writes, "needs": needs, "config": experiment.model_dump(mode="json")}
    print(yaml.safe_dump(plan, sort_keys=False, allow_unicode=True))
    raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(mu2llm.__version__)
        raise typer.Exit


config_app = typer.Typer(no_args_is_help=True, help="The configuration.")
app.add_typer(config_app, name="config")


@config_app.command("show")
def config_show(preset: Preset = "demo", set_: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Print the resolved configuration."""
    values = config.load(preset, set_).model_dump(mode="json")
    print(json.dumps(values) if as_json else yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, float, float, dict[str, float]], None]]:
    """A bar with time left for each step that reports itself as (step, done, of how many, numbers)."""
    columns = ("[bold]{task.description:<12}", "{task.fields[numbers]}")
    bars = Progress(
        TextColumn(columns[0]), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn(columns[1]), console=console,
    )  # fmt: skip
    tasks: dict[str, Any] = {}

    def show(step: str, done: float, total: float, numbers: dict[str, float]) -> None:
        if step not in tasks:
            tasks[step] = bars.add_task(step, total=total, numbers="")
        told = {
            "loss": numbers.get("loss"),
            "samples/s": numbers.get("samples_per_second"),
            "wait": numbers.get("data_wait_share"),
        }
        text = "  ".join(f"{name} {value:.3g}" for name, value in told.items() if value is not None)
        extra = {"numbers": text} if text else {}
        bars.update(tasks[step], completed=done, total=total, **extra)

    with bars:
        yield show


# ---- scans


@app.command()
def phantom(out: Out, cases: int = 100, seed: int = 0, as_json: Json = False) -> None:
    """Write procedural CT phantoms: volumes and manifest.jsonl."""
    from mu2llm.ct import phantom as phantoms

    with progress_bars() as bars:
        manifest = phantoms.write(out, cases, seed, progress=lambda done, all_: bars("phantoms", done, all_, {}))
    show({"manifest": manifest, "cases": cases, "seed": seed}, as_json)


@app.command()
def inspect(
    paths: list[str],
    as_json: Json = False,
    save_png: Annotated[str | None, typer.Option(help="Folder for a three-plane picture of each scan.")] = None,
) -> None:
    """Read scans and say what they are, what was set right, and why one is rejected."""
    from mu2llm import ct

    items = [ct.inspect(path) for path in paths]
    if save_png:
        for item in items:
            if item["status"] == "ok":
                name = Path(str(item["path"]).rstrip("/")).name.removesuffix(".gz").removesuffix(".nii")
                item["png"] = str(Path(save_png) / f"{name}.png")
                Path(save_png).mkdir(parents=True, exist_ok=True)
                ct.three_planes(ct.read(item["path"]), item["png"])
    if as_json:
        print(json.dumps(items))
        return
    table = Table("scan", "status", "shape", "spacing mm", "axes", "HU", "warnings")
    for item in items:
        told = [str(item.get(key) or "") for key in ("shape", "spacing", "orientation", "hu_range")]
        reason = f"[red]{item['reason']}[/]: {item['message']}" if item["reason"] else "[green]ok[/]"
        table.add_row(str(item["path"]), reason, *told, ", ".join(item["warnings"]))
    Console().print(table)


@app.command()
def ingest(
    manifest: Annotated[str, typer.Option(help="The table of cases.")],
    volumes: Annotated[str, typer.Option(help="Root of the manifest's relative paths.")],
    out: Out,
    format: Annotated[
        str, typer.Option(help="jsonl, csv, parquet, ct-rate, amos-mm, abdomenatlas3 or m3d-cap")
    ] = "jsonl",
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    address: Address = None,
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    """Manifest and volumes → shards, and a table of what was rejected and why."""
    experiment = config.load(preset, set_)
    if dry:
        dry_run(experiment, [manifest, volumes], [out], f"spec {experiment.data.spec.name}; memory of one shard a core")
    from mu2llm import cases, cluster

    with cluster.session(address), progress_bars() as bars:
        table = cases.read_manifest(manifest, format, volumes, experiment.data)
        result = cases.ingest(table, out, experiment, lambda done, all_: bars("ingest", done, all_, {}))
    show({**result, "notes": table.counts} if not as_json else result, as_json)


# ---- training

train_app = typer.Typer(no_args_is_help=True, help="One stage of training.")
app.add_typer(train_app, name="train")
Init = Annotated[str | None, typer.Option("--init", help="Checkpoint to start from.")]


def _train(
    stage: str, data: str, out: str, init: str | None, experiment: config.Experiment, address: str | None, as_json: bool
) -> None:
    from importlib import import_module

    from mu2llm import cluster

    module = import_module(f"mu2llm.stages.{stage}")
    with cluster.session(address), progress_bars() as bars:
        checkpoint = module.run(
            data, out, experiment, init, lambda numbers: bars(stage, numbers.get("step", 0), numbers["total"], numbers)
        )
    training = checkpoint.training
    show({"checkpoint": out, **training.model_dump(exclude={"history"})}, as_json)


def _stage_command(stage: str, help: str) -> None:
    @train_app.command(stage, help=help)
    def command(
        data: Data,
        out: Out,
        init: Init = None,
        preset: Preset = "demo",
        set_: Set = [],  # noqa: B006
        workers: Annotated[str | None, typer.Option(help="N, or MIN-MAX for elastic training.")] = None,
        gpus: Annotated[float | None, typer.Option(help="GPUs a worker.")] = None,
        address: Address = None,
        dry: DryRun = False,
        as_json: Json = False,
    ) -> None:
        overrides = list(set_)
        if workers:
            low, dash, high = workers.partition("-")
            overrides.append(f"{stage}.workers=[{low},{high}]" if dash else f"{stage}.workers={low}")
        if gpus is not None:
            overrides.append(f"{stage}.gpus_per_worker={gpus}")
        experiment = config.load(preset, overrides)
        if dry:
            settings = getattr(experiment, stage)
            needs = f"{settings.workers} workers of {settings.cpus_per_worker:g} CPU, {settings.gpus_per_worker:g} GPU"
            dry_run(experiment, [data, *([init] if init else [])], [out], needs)
        _train(stage, data, out, init, experiment, address, as_json)


_stage_command("contrastive", "Scans and what their reports say meet in one space: the vision tower.")
_stage_command("sft", "The language model learns to write the report.")
_stage_command("dpo", "The SFT model learns to prefer what the judge preferred; --data is what `prefer` wrote.")


@app.command()
def prefer(
    checkpoint: Annotated[str, typer.Option(help="The SFT checkpoint that writes the candidates.")],
    data: Data,
    out: Out,
    judge: Annotated[str | None, typer.Option(help="rules, hf:NAME_OR_PATH or openai:MODEL@URL")] = None,
    negatives: Annotated[str | None, typer.Option(help="sampled or corrupted")] = None,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    address: Address = None,
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    """Candidates → judgements → preference pairs."""
    overrides = [*set_, *([f"judge.name={judge}"] if judge else [])]
    experiment = config.load(preset, [*overrides, *([f"preferences.negatives={negatives}"] if negatives else [])])
    if dry:
        dry_run(experiment, [checkpoint, data], [out], f"judge {experiment.judge.name}")
    from mu2llm import cluster
    from mu2llm.stages import preferences

    with cluster.session(address), progress_bars() as bars:
        result = preferences.prefer(
            checkpoint, data, out, experiment, progress=lambda done, all_: bars("candidates", done, all_, {})
        )
    keys = {"cases", "candidates", "pairs", "cases_with_pairs", "dropped", "green_best", "green_worst", "judge"}
    show(result.model_dump(include=keys), as_json)


# ---- reports and what they are worth


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint to evaluate.")],
    data: Data,
    out: Out,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    judge: Annotated[str | None, typer.Option(help="rules, hf:NAME_OR_PATH or openai:MODEL@URL")] = None,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    address: Address = None,
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the reports of a split and score them: metrics with intervals, audits, report.html."""
    experiment = config.load(preset, [*set_, *([f"judge.name={judge}"] if judge else [])])
    if dry:
        dry_run(experiment, [checkpoint, data], [out], f"judge {experiment.judge.name}")
    from mu2llm import cluster
    from mu2llm.evaluation import evaluate as evaluation

    with cluster.session(address), progress_bars() as bars:
        result = evaluation.evaluate(
            checkpoint, data, out, experiment, split, lambda done, all_: bars("evaluate", done, all_, {})
        )
    show(result, as_json)


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint that writes.")],
    paths: Annotated[list[str] | None, typer.Argument(help="Scans: file, DICOM folder, zip or URI.")] = None,
    manifest: Annotated[str | None, typer.Option(help="A manifest of scans instead of paths.")] = None,
    volumes: Annotated[str, typer.Option(help="Root of the manifest's relative paths.")] = ".",
    accept: Annotated[list[str], typer.Option(help="Codes that are let in, such as not_hu.")] = [],  # noqa: B006
    set_: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Scans → reports."""
    from mu2llm.cases import read_manifest
    from mu2llm.evaluation.scans import report_scans
    from mu2llm.records import Checkpoint

    experiment = config.validate(Checkpoint.open(checkpoint).experiment)
    scans = list(paths or [])
    if manifest:
        table = read_manifest(manifest, "jsonl", volumes, experiment.data, need_report=False)
        scans += [case.volume for case in table.cases]
    if not scans:
        raise UserError("no scans: give paths, or --manifest")
    with progress_bars() as bars:
        entries = report_scans(
            checkpoint, scans, experiment.evaluation, tuple(accept), lambda done, all_: bars("generate", done, all_, {})
        )
    if as_json:
        print(json.dumps(entries))
        return
    for entry in entries:
        Console().print(f"[bold]{entry['path']}[/]\n{entry.get('report') or '[red]' + entry['message'] + '[/]'}\n")


green_app = typer.Typer(no_args_is_help=True, help="The GREEN score.")
app.add_typer(green_app, name="green")


@green_app.command("score")
def green_score(
    pairs: Annotated[Path, typer.Option(help="JSON lines of {reference, candidate}.")],
    judge: Annotated[str, typer.Option(help="rules, hf:NAME_OR_PATH or openai:MODEL@URL")] = "rules",
    set_: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Judge pairs of reports."""
    from mu2llm.green import load_judge
    from mu2llm.green.scoring import score_lines

    experiment = config.load("demo", [*set_, f"judge.name={judge}"])
    if not pairs.is_file():
        raise UserError(f"--pairs {pairs}: there is no such file")
    with pairs.open() as lines:
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


# ---- the whole way


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
    show(summarise(experiment.model, experiment.data.spec).as_dict(), as_json)


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="A local folder.")] = "mu2llm-demo",
    scan: Annotated[list[str], typer.Option("--scan", help="A scan to report at the end; repeatable.")] = [],  # noqa: B006
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    """The whole pipeline on embedded defaults, then a report for each scan given."""
    experiment = config.load(preset, set_)
    if dry:
        dry_run(experiment, scan, [out], "2 CPU cores, 8 GiB of memory, 3 GB of disk")
    from mu2llm import pipeline

    pipeline.check_out(out)
    if fresh:
        pipeline.clear(out)
    started = time.monotonic()
    with progress_bars() as bars:
        summary = pipeline.demo(experiment, out, scan, bars)
    if as_json:
        print(json.dumps(summary, default=str))
        return
    console.print(f"{time.monotonic() - started:.0f} s; {out}/summary.json, {out}/report.html")
    Console().print(pipeline.table(summary))
    for entry in summary["scans"]:
        Console().print(f"[bold]{entry['path']}[/]\n{entry.get('report') or entry['message']}\n")

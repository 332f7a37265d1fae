"""The whole way: demo, and pipeline on scans of one's own."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from mu2llm import config
from mu2llm.cli.app import (
    Address,
    DryRun,
    Format,
    Fresh,
    Json,
    Manifest,
    Out,
    Preset,
    Set,
    Volumes,
    app,
    console,
    dry_run,
    print_scan,
    progress_bars,
    result_alone_on_stdout,
    result_console,
    work_on_ray,
)

Scans = Annotated[list[str], typer.Option("--scan", help="A scan to report at the end; repeatable.")]


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="A local folder.")] = "mu2llm-demo",
    scan: Scans = [],  # noqa: B006
    fresh: Fresh = False,
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
    from mu2llm.summary import table

    pipeline.check_out(out)
    if fresh:
        pipeline.clear(out)
    started = time.monotonic()
    with result_alone_on_stdout(), progress_bars() as bars:
        summary = pipeline.demo(experiment, out, scan, bars)
    if as_json:
        print(json.dumps(summary, default=str))
        return
    console.print(f"{time.monotonic() - started:.0f} s; {out}/summary.json, {out}/report.html")
    result_console().print(table(summary))
    for entry in summary["scans"]:
        print_scan(entry["path"], entry["message"] if entry.get("report") is None else entry["report"])


@app.command()
def pipeline(
    manifest: Manifest,
    volumes: Volumes,
    out: Out,
    format: Format = "jsonl",
    scan: Scans = [],  # noqa: B006
    fresh: Fresh = False,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    address: Address = None,
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    """The whole pipeline on scans of one's own, from a manifest to a registered checkpoint, all below --out."""
    experiment = config.load(preset, set_)
    if dry:
        dry_run(experiment, [manifest, volumes, *scan], [out], f"what {experiment.name}.yaml says in its first lines")
    from mu2llm import pipeline as way
    from mu2llm.summary import table

    source = way.Source(manifest, volumes, format)
    with work_on_ray(address) as bars:
        summary = way.run(experiment, out, source, bars, scan, fresh)
    if as_json:
        print(json.dumps(summary, default=str))
        return
    console.print(f"{out}/summary.json, {out}/report.html")
    result_console().print(table(summary))

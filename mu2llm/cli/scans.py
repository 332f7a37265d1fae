"""Scans: phantoms, inspect, ingest."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape

from mu2llm import config, storage
from mu2llm.cli.app import (
    Accept,
    Address,
    DryRun,
    Format,
    Json,
    Manifest,
    Out,
    Preset,
    Series,
    Set,
    Volumes,
    app,
    dry_run,
    progress_bars,
    result_console,
    show,
    work_on_ray,
)
from mu2llm.progress import counted


@app.command()
def phantom(
    out: Out,
    cases: int = 100,
    seed: int = 0,
    nodules: Annotated[str, typer.Option(help="balls, or lidc: of LIDC's sizes and shapes.")] = "balls",
    as_json: Json = False,
) -> None:
    """Write procedural CT phantoms: volumes and manifest.jsonl."""
    from mu2llm.ct import phantom as phantoms

    with progress_bars() as bars:
        manifest = phantoms.write(out, cases, seed, progress=counted(bars, "phantoms"), nodules=nodules)
    show({"manifest": manifest, "cases": cases, "seed": seed}, as_json)


@app.command()
def inspect(
    paths: list[str],
    as_json: Json = False,
    save_png: Annotated[str | None, typer.Option(help="Folder for a three-plane picture of each scan.")] = None,
    series: Series = None,
    accept: Accept = [],  # noqa: B006
) -> None:
    """Read scans and say what they are, what was set right, and why one is rejected."""
    from mu2llm import ct

    pictures = _pictures(paths, save_png) if save_png else [None] * len(paths)
    items = [
        ct.inspect(path, picture, series=series, accept=accept) for path, picture in zip(paths, pictures, strict=True)
    ]
    if as_json:
        print(json.dumps(items))
        return
    for item in items:
        result_console().print(*_description(item), sep="\n  ", highlight=False, soft_wrap=True)


def _description(item: dict[str, Any]) -> Iterator[str]:
    """Lines for people: the scan, what it is or why it is rejected, and what was set right."""
    from mu2llm import ct

    yield f"[bold]{escape(item['path'])}[/]"
    if item["status"] == "rejected":
        yield f"[red]rejected[/]  {item['reason']}: {escape(item['message'])}"
        return
    shape, spacing = ("×".join(f"{n:g}" for n in item[key]) for key in ("shape", "spacing"))
    low, high = item["hu_range"]
    yield f"[green]ok[/]  {shape} voxels of {spacing} mm, stored {item['orientation']}, {low:g} to {high:g} HU"
    for code in item["warnings"]:
        yield f"[yellow]{code}[/]: {ct.WARNINGS[code]}"
    for name, told in item["others"].items():
        yield f"not read: {escape(told)}; --series {escape(shlex.quote(name))} reads it"


def _pictures(paths: list[str], folder: str) -> list[str]:
    """A file of its own for each scan's picture, also where two scans have the same name."""
    seen: Counter[str] = Counter()
    pictures = []
    for path in paths:
        name = path.rstrip("/").rpartition("/")[2].removesuffix(".gz").removesuffix(".nii") or "scan"
        seen[name] += 1
        pictures.append(storage.join(folder, f"{name}-{seen[name]}.png" if seen[name] > 1 else f"{name}.png"))
    return pictures


@app.command()
def ingest(
    manifest: Manifest,
    volumes: Volumes,
    out: Out,
    format: Format = "jsonl",
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
    from mu2llm import cases

    with work_on_ray(address) as bars:
        table = cases.read_manifest(manifest, format, volumes, experiment.data)
        over = None
        try:
            result = cases.ingest(table, out, experiment, counted(bars, "ingest"))
        except cases.OverBudget as error:
            result, over = error.result, error
    show({**result, "notes": table.counts} if not as_json else result, as_json)
    if over:
        raise over

"""What was tracked: runs list, show, compare, lineage, sync."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter
from rich.markup import escape
from rich.table import Table

from mu2llm import tracking
from mu2llm.cli.app import Json, app, console, result_console, show
from mu2llm.errors import Failure, UserError

runs_app = typer.Typer(
    no_args_is_help=True, help="What was tracked: runs, their numbers, where a checkpoint came from."
)
app.add_typer(runs_app, name="runs")
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="First digits of an id, a checkpoint's URI, or registry://")
]
SHORT = 8


def send_waiting() -> None:
    """Sends what an earlier command could not: at the start of every command, in a moment if there is nothing."""
    if not tracking.waiting():
        return
    delivery = tracking.deliver(tracking.store())
    if delivery.sent:
        console.print(f"tracking: sent {delivery.sent} entries that waited for {delivery.store}", highlight=False)
    elif delivery.why:
        console.print(f"tracking: {delivery.waiting} entries wait: {delivery.why}", style="yellow", highlight=False)


@runs_app.command("list")
def runs_list(
    stage: Annotated[str | None, typer.Option(help="contrastive, sft, dpo, evaluate, promote …")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 20,
    as_json: Json = False,
) -> None:
    """The newest runs."""
    found = tracking.runs(stage, limit)
    if as_json:
        print(TypeAdapter(list[tracking.Run]).dump_json(found).decode())
        return
    if not found:
        console.print(f"{tracking.shown(tracking.store())} has no runs{f' of stage {stage}' if stage else ''}")
        return
    table = Table("run", "stage", "status", "started", "seconds", "loss", "GREEN", box=None)
    table.add_column("checkpoint", overflow="fold")
    for run in found:
        style = {"FAILED": "red", "KILLED": "red", "RUNNING": "cyan"}.get(run.status)
        numbers = [_number(run.metrics.get(name)) for name in ("loss", "green")]
        seconds = _number(run.seconds)
        name = f"  {run.id[:SHORT]}" if run.parent else run.id[:SHORT]
        table.add_row(
            name,
            run.stage,
            run.status,
            _moment(run.started),
            seconds,
            *numbers,
            escape(run.checkpoint or ""),
            style=style,
        )
    result_console().print(table)


@runs_app.command("show")
def runs_show(
    run: RunName,
    metric: Annotated[str | None, typer.Option(help="Every value of a metric, by step.")] = None,
    as_json: Json = False,
) -> None:
    """One run: its lineage, links, configuration and last numbers."""
    found = tracking.find(run)
    if metric:
        _show_history(found, metric, as_json)
        return
    if as_json:
        print(found.model_dump_json())
        return
    head = {"run": found.id, "stage": found.stage, "status": found.status, "started": _moment(found.started)}
    own = {name: value for name, value in found.tags.items() if value and not name.startswith("leaderboard")}
    show(
        {**head, "seconds": _number(found.seconds), **({"part of": found.parent} if found.parent else {}), **own}, False
    )
    for title, values in (("metrics", found.metrics), ("configuration", found.parameters)):
        result_console().print(f"\n[bold]{title}[/]")
        show(dict(sorted(values.items())), False)


def _show_history(run: tracking.Run, metric: str, as_json: bool) -> None:
    if metric not in run.metrics:
        raise UserError(f"run {run.id} has no metric {metric}; it has {', '.join(sorted(run.metrics)) or 'none'}")
    values = tracking.history(run, metric)
    if as_json:
        print(json.dumps([{"step": step, "value": value} for step, value in values]))
        return
    table = Table("step", metric, box=None)
    for step, value in values:
        table.add_row(str(step), _number(value))
    result_console().print(table)


@runs_app.command("compare")
def runs_compare(names: Annotated[list[str], typer.Argument(metavar="RUN RUN…")], as_json: Json = False) -> None:
    """Runs side by side: their numbers, and what in configuration and lineage differs."""
    if len(names) < 2:
        raise UserError("give two runs or more to compare")
    chosen = [tracking.find(name) for name in names]
    metrics = {
        name: [run.metrics.get(name) for run in chosen] for name in sorted({m for r in chosen for m in r.metrics})
    }
    different = tracking.differences(chosen)
    if as_json:
        print(json.dumps({"runs": [run.id for run in chosen], "metrics": metrics, "differences": different}))
        return
    table = Table("", *(f"{run.stage} {run.id[:SHORT]}" for run in chosen), box=None)
    for name, values in metrics.items():
        table.add_row(name, *(_number(value) for value in values))
    table.add_section()
    for name, texts in different.items():
        table.add_row(name, *(escape(text) if text is not None else "–" for text in texts))
    result_console().print(table)


@runs_app.command("lineage")
def runs_lineage(run: RunName, as_json: Json = False) -> None:
    """Where a run or checkpoint came from, back to its first stage: data, spec, judge and commit of each."""
    chain = tracking.lineage(run)
    if as_json:
        print(json.dumps([step.model_dump() for step in chain]))
        return
    named = {uri: alias for alias, uri in tracking.aliases().items()}
    for number, step in enumerate(chain):
        alias = f" [green]{named[step.checkpoint]}[/]" if step.checkpoint in named else ""
        result_console().print(
            f"{'from ' if number else ''}[bold]{step.stage}[/]{alias} {escape(step.checkpoint or '')}", soft_wrap=True
        )
        facts = step.model_dump(exclude={"stage", "checkpoint", "parent"}, exclude_none=True)
        show({f"    {name}": value for name, value in facts.items()}, False)


@runs_app.command("sync")
def runs_sync(as_json: Json = False) -> None:
    """Send what waits for the tracking store; exits 1 where something has to wait on."""
    delivery = tracking.deliver(tracking.store())
    show(delivery.model_dump(), as_json)
    for refused in tracking.refused():
        console.print(f"refused, kept aside: {refused['why']}", style="yellow", highlight=False)
    if delivery.waiting:
        raise Failure(f"{delivery.waiting} entries wait on: {delivery.why or 'another process is sending them'}")


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def _moment(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(milliseconds / 1000))

"""Sweeps and the ablation: sweep tokenizer, sweep dpo, ablation."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from mu2llm import config
from mu2llm.cli.app import (
    Address,
    Data,
    DryRun,
    Json,
    Out,
    Preset,
    Set,
    app,
    dry_run,
    result_console,
    show,
    work_on_ray,
)
from mu2llm.cli.stages import Init
from mu2llm.errors import UserError

sweep_app = typer.Typer(no_args_is_help=True, help="Search for better values of the configuration, on Ray Tune.")
app.add_typer(sweep_app, name="sweep")


def _sweep_command(kind: Literal["tokenizer", "dpo"], help: str) -> None:
    @sweep_app.command(kind, help=help)
    def command(
        data: Data,
        out: Out,
        init: Init = None,
        preset: Preset = "sweep",
        set_: Set = [],  # noqa: B006
        trials: Annotated[int | None, typer.Option(help="Trials in all, those before a --resume included.")] = None,
        search: Annotated[str | None, typer.Option(help="optuna (TPE), random or grid")] = None,
        objective: Annotated[
            list[str],
            typer.Option(
                help="green, finding_f1, grounding_gap, visual_tokens, seconds_per_scan, kl; several: Pareto."
            ),
        ] = [],  # noqa: B006
        workers_per_trial: Annotated[int | None, typer.Option(help="0: in the trial's own, warm process.")] = None,
        gpus_per_trial: Annotated[float | None, typer.Option(help="May be a fraction.")] = None,
        max_concurrent: Annotated[int | None, typer.Option(help="Trials at once; default: what fits.")] = None,
        time_budget: Annotated[float | None, typer.Option(help="Seconds after which no trial goes on.")] = None,
        final_seeds: Annotated[int | None, typer.Option(help="Seeds for winner and default; 0: no comparison.")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep that lies in --out.")] = False,
        address: Address = None,
        dry: DryRun = False,
        as_json: Json = False,
    ) -> None:
        given = {
            **{"trials": trials, "search": search, "objective": json.dumps(objective) if objective else None},
            **{"workers_per_trial": workers_per_trial, "gpus_per_trial": gpus_per_trial},
            **{"max_concurrent": max_concurrent, "time_budget_s": time_budget, "final_seeds": final_seeds},
        }
        overrides = [f"sweep.{name}={value}" for name, value in given.items() if value is not None]
        experiment = config.load(preset, [*set_, *overrides])
        _run(kind, data, init, out, experiment, resume, address, dry, as_json)


def _run(
    kind: Literal["tokenizer", "dpo"],
    data: str,
    init: str | None,
    out: str,
    experiment: config.Experiment,
    resume: bool,
    address: str | None,
    dry: bool,
    as_json: bool,
) -> None:
    from mu2llm.sweeps import sweep

    planned = sweep.plan(kind, data, init, out, experiment)
    if dry:
        dry_run(experiment, [data, planned.init], [out], sweep.plan_text(planned))
    with work_on_ray(address) as bars:
        found = sweep.run(planned, resume, _named(bars))
    if as_json:
        show(found, as_json)
        return
    _print(planned, found)


def _named(bars: Callable[..., None]) -> Callable[[str, float, float, dict[str, float]], None]:
    return lambda step, done, total, numbers: bars(step, done, total, {})


def _print(planned: Any, found: dict[str, Any]) -> None:
    from mu2llm.sweeps import results
    from mu2llm.sweeps.sweep import trials_of

    sweep = planned.base.sweep
    result_console().print(
        results.terminal(results.ranked(trials_of(planned.out, sweep.storage), sweep.objective), sweep.objective)
    )
    if found["final"]:
        result_console().print(found["final"]["said"], markup=False)
    result_console().print(f"{found['page']}\n{found['command']}", soft_wrap=True, highlight=False, markup=False)


_sweep_command(
    "tokenizer", "Scales, top_k, queries, temperature, attention, layers: SFT from one contrastive checkpoint."
)
_sweep_command("dpo", "Beta, loss, learning rate, pairs: DPO from one SFT checkpoint; --data is what `prefer` wrote.")


@app.command()
def ablation(
    data: Data,
    out: Out,
    init: Init = None,
    seeds: Annotated[int, typer.Option(min=1, help="Times that each variant is trained.")] = 3,
    fractions: Annotated[
        str, typer.Option(help="Of the training patients, for the baseline, all and its DPO: 0.1,0.3,1")
    ] = "1",
    preset: Preset = "sweep",
    set_: Set = [],  # noqa: B006
    workers_per_trial: Annotated[int | None, typer.Option(help="0: in the trial's own, warm process.")] = None,
    gpus_per_trial: Annotated[float | None, typer.Option(help="May be a fraction.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Trials at once; default: what fits.")] = None,
    address: Address = None,
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    """The paper's ablation with seeds and intervals: baseline, +RPE, +DTS, +DMTP, all three, all three + DPO."""
    given = {
        **{"workers_per_trial": workers_per_trial, "gpus_per_trial": gpus_per_trial},
        "max_concurrent": max_concurrent,
    }
    overrides = [f"sweep.{name}={value}" for name, value in given.items() if value is not None]
    experiment = config.load(preset, [*set_, *overrides])
    from mu2llm.sweeps import ablation as experiments

    planned = experiments.plan(data, init, out, experiment, seeds, _fractions(fractions))
    if dry:
        needs = f"{len(planned.points())} runs of sft, {seeds * len(planned.fractions)} of prefer and dpo"
        dry_run(experiment, [data, *([init] if init else [])], [out], needs)
    with work_on_ray(address) as bars:
        found = experiments.run(data, init, out, experiment, seeds, planned.fractions, _named(bars))
    if as_json:
        show(found, as_json)
        return
    cells = [experiments.Cell.model_validate(cell) for cell in found["cells"]]
    result_console().print(experiments.terminal(cells, found))
    result_console().print(f"{found['note']}\n{found['page']}", highlight=False, markup=False)


def _fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--fractions {text}: expected numbers with commas between, such as 0.1,0.3,1") from None

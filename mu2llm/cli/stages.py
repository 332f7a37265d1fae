"""The stages: train contrastive, sft, dpo; prefer; online."""

from __future__ import annotations

from typing import Annotated

import typer

from mu2llm import config
from mu2llm.cli.app import (
    Address,
    CheckpointUri,
    Data,
    DryRun,
    Fresh,
    Json,
    JudgeName,
    Out,
    Preset,
    Set,
    app,
    checkpoint_place,
    dry_run,
    load_with_judge,
    result_console,
    show,
    work_on_ray,
)
from mu2llm.progress import counted, logged

train_app = typer.Typer(no_args_is_help=True, help="One stage of training.")
app.add_typer(train_app, name="train")
Init = Annotated[
    str | None, typer.Option("--init", parser=checkpoint_place, metavar="URI", help="Checkpoint to start from.")
]


def _train(
    stage: str,
    data: str,
    out: str,
    init: str | None,
    experiment: config.Experiment,
    address: str | None,
    fresh: bool,
    as_json: bool,
) -> None:
    from importlib import import_module

    module = import_module(f"mu2llm.stages.{stage}")
    with work_on_ray(address) as bars:
        checkpoint = module.run(data, out, experiment, init, logged(bars, stage), fresh=fresh)
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
        fresh: Fresh = False,
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
            from mu2llm.model.memory import training_memory

            needs = f"{settings.workers} workers of {settings.cpus_per_worker:g} CPU, {settings.gpus_per_worker:g} GPU"
            needs += f" and {training_memory(experiment, stage)}"  # type: ignore[arg-type]
            dry_run(experiment, [data, *([init] if init else [])], [out], needs)
        _train(stage, data, out, init, experiment, address, fresh, as_json)


_stage_command("contrastive", "Scans and what their reports say meet in one space: the vision tower.")
_stage_command("sft", "The language model learns to write the report.")
_stage_command("dpo", "The SFT model learns to prefer what the judge preferred; --data is what `prefer` wrote.")


@app.command()
def prefer(
    checkpoint: CheckpointUri,
    data: Data,
    out: Out,
    judge: JudgeName = None,
    negatives: Annotated[str | None, typer.Option(help="sampled or corrupted")] = None,
    corrections: Annotated[
        str | None, typer.Option(help="JSON lines of radiologists' corrections, or a folder of such files.")
    ] = None,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    address: Address = None,
    fresh: Fresh = False,
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    """Candidates → judgements → preference pairs."""
    overrides = [*set_, *([f"preferences.negatives={negatives}"] if negatives else [])]
    experiment = load_with_judge(preset, overrides, judge)
    if dry:
        reads = [checkpoint, data, *([corrections] if corrections else [])]
        dry_run(experiment, reads, [out], f"judge {experiment.judge.name}")
    from mu2llm.stages import preferences

    with work_on_ray(address) as bars:
        result = preferences.prefer(
            checkpoint,
            data,
            out,
            experiment,
            progress=counted(bars, "candidates"),
            corrections=corrections,
            fresh=fresh,
        )
    keys = {"cases", "candidates", "pairs", "cases_with_pairs", "dropped", "green_best", "green_worst", "judge"}
    show(result.model_dump(include=keys), as_json)


@app.command()
def online(
    checkpoint: CheckpointUri,
    data: Data,
    out: Out,
    rounds: Annotated[int, typer.Option(help="At most so many.")] = 2,
    judge: JudgeName = None,
    preset: Preset = "demo",
    set_: Set = [],  # noqa: B006
    address: Address = None,
    fresh: Fresh = False,
    dry: DryRun = False,
    as_json: Json = False,
) -> None:
    """Rounds of candidates of the current policy → pairs → DPO, until held-out findings get worse."""
    experiment = load_with_judge(preset, set_, judge)
    if dry:
        dry_run(experiment, [checkpoint, data], [out], f"judge {experiment.judge.name}")
    from mu2llm.stages import online

    with work_on_ray(address) as bars:
        result = online.run(checkpoint, data, out, experiment, rounds, bars, fresh)
    if as_json:
        show(result.model_dump(), as_json)
    else:
        result_console().print(online.table(result))

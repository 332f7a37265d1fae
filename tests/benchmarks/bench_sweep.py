"""A full grid of betas × losses against TPE with ASHA: the same best value, for how much of the training?

    python tests/benchmarks/bench_sweep.py --data PAIRS --init SFT --out FOLDER [--preset sweep] [--trials 12]

PAIRS is what `mu2llm prefer` wrote. Compute is counted in optimiser steps, which do not depend on what else the
machine does; the seconds beside them do. Run again with the same --out, it goes on.
"""

from __future__ import annotations

import argparse
from statistics import median

from rich.console import Console
from rich.table import Table

from mu2llm import cluster, config, storage
from mu2llm.sweeps import results, sweep
from mu2llm.sweeps.trial import Trial

SPACE = [
    "sweep.space.dpo.learning_rate=null",
    "sweep.space.preferences=null",
    "sweep.space.dpo.beta={log: [0.01, 1], points: 12}",
    "sweep.objective=[green]",
    "sweep.final_seeds=0",
]
SEARCHES = {
    "grid, to the end": ["sweep.search=grid", "sweep.scheduler=none"],
    "TPE + ASHA": ["sweep.search=optuna", "sweep.scheduler=asha"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--data", "--init", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--preset", default="sweep")
    parser.add_argument("--losses", default="[[sigmoid], [ipo]]")
    parser.add_argument("--trials", type=int, default=12, help="of TPE + ASHA")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    given = parser.parse_args()
    found: dict[str, list[Trial]] = {}
    with cluster.session():
        for name, sets in SEARCHES.items():
            losses = f"sweep.space.dpo.loss={{choice: {given.losses}}}"
            experiment = config.load(given.preset, [*SPACE, losses, *sets, f"sweep.trials={given.trials}", *given.sets])
            out = storage.join(given.out, name.partition(",")[0].replace(" + ", "-"))
            resume = storage.exists(storage.join(out, sweep.FILE))
            sweep.run(sweep.plan("dpo", given.data, given.init, out, experiment), resume)
            found[name] = sweep.trials_of(out, experiment.sweep.storage)
    Console(width=140).print(table(found))


def table(found: dict[str, list[Trial]]) -> Table:
    """One row a search, its share of the grid's compute, and its best value with the interval over patients."""
    shown = Table(
        "", "trials", "stopped", "steps", "share", "s in training", "s besides, a trial", "best GREEN", "beta", "loss"
    )
    steps = {name: sum(trial.metrics.get("step", 0) for trial in trials) for name, trials in found.items()}
    whole = next(iter(steps.values()))
    for name, trials in found.items():
        best = results.winner(results.ranked(trials, ["green"]), ["green"])
        assert best, f"no trial of {name} came to its end"
        shown.add_row(
            name,
            str(len(trials)),
            str(sum(trial.status == "stopped" for trial in trials)),
            f"{steps[name]:.0f}",
            f"{steps[name] / whole:.0%}",
            f"{sum(trial.training_seconds for trial in trials):.0f}",
            f"{median(trial.overhead_seconds for trial in trials):.1f}",
            results.cell(best.estimate("green")),
            f"{best.params['dpo.beta']:g}",
            "+".join(best.params["dpo.loss"]),
        )
    return shown


if __name__ == "__main__":
    main()

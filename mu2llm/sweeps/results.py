"""Trials → what they say: repetitions together, ranked, the Pareto front, intervals over patients or seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
from rich.table import Table
from scipy import stats

from mu2llm import storage
from mu2llm.evaluation.results import TITLES as METRIC_TITLES
from mu2llm.records import Estimate
from mu2llm.stages.validation import METRICS
from mu2llm.sweeps.space import Params, canonical
from mu2llm.sweeps.trial import DIRECTIONS, OPTUNA, Trial

LEADERBOARD = "leaderboard.parquet"
TITLES = {
    **METRIC_TITLES,
    **{"finding_f1": "Findings F1", "visual_tokens": "visual tokens", "seconds_per_scan": "s a scan"},
    **{"kl": "KL to the reference", "grounding_gap": "grounding gap (nats a token)"},
}


@dataclass(frozen=True)
class Row:
    """A point of the space and the trials of it, one for each seed."""

    trials: tuple[Trial, ...]

    @property
    def params(self) -> Params:
        return self.trials[0].point.params

    @property
    def status(self) -> str:
        return "done" if any(trial.status == "done" for trial in self.trials) else self.trials[0].status

    def estimate(self, name: str) -> Estimate | None:
        """The mean over the finished seeds with its 95 % t interval; of one trial, its own interval over patients."""
        ended = [trial for trial in self.trials if trial.status == "done"] or list(self.trials)
        return over_seeds([trial.estimate(name) for trial in ended])

    def value(self, name: str) -> float | None:
        estimate = self.estimate(name)
        return estimate.value if estimate else None


def over_seeds(seeds: Sequence[Estimate | None]) -> Estimate | None:
    """The mean over seeds with its 95 % t interval, n of them; of a single seed, its own interval."""
    known = [estimate for estimate in seeds if estimate]
    if len(known) < 2:
        return known[0] if known else None
    values = [estimate.value for estimate in known]
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return Estimate(value=mean, low=mean - half, high=mean + half, n=len(values))


def ranked(trials: Sequence[Trial], objective: Sequence[str]) -> list[Row]:
    """Repetitions together; best first by the first objective, then what was stopped, then what gave nothing."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(canonical(trial.point.model_dump(exclude={"seed", "keep"})), []).append(trial)
    sign = -1 if DIRECTIONS[objective[0]] == "max" else 1

    def rank(row: Row) -> tuple[int, float, int]:
        value = row.value(objective[0])
        order = {"done": 0, "stopped": 1}.get(row.status, 2) if value is not None else 2
        return order, sign * (value or 0.0), row.trials[0].number

    return sorted((Row(tuple(group)) for group in groups.values()), key=rank)


def front(rows: Sequence[Row], objective: Sequence[str]) -> list[Row]:
    """The finished rows that no other one beats in one objective without losing in another, best first."""
    study = optuna.create_study(directions=[OPTUNA[name] for name in objective])
    for place, row in enumerate(rows):
        values = [row.value(name) for name in objective]
        if row.status == "done" and None not in values:
            study.add_trial(optuna.trial.create_trial(values=values, user_attrs={"row": place}))  # type: ignore[arg-type]
    return [rows[place] for place in sorted(best.user_attrs["row"] for best in study.best_trials)]


def winner(rows: Sequence[Row], objective: Sequence[str]) -> Row | None:
    """The best finished row by the first objective; among equals on it, one on the front."""
    return next(iter(front(rows, objective)), None)


def measured(rows: Sequence[Row], objective: Sequence[str]) -> list[str]:
    """The metrics to show: the objectives first, then the scores."""
    return [name for name in dict.fromkeys([*objective, *METRICS]) if any(row.value(name) is not None for row in rows)]


def write_leaderboard(out: str, trials: Sequence[Trial]) -> str:
    """One row a trial, in the order in which they ended; a key's column holds its value as JSON."""
    rows = [
        {
            **{"trial": trial.id, "number": trial.number, "name": trial.point.name, "status": trial.status},
            **{"why": trial.why, "seed": trial.point.seed},
            **{key: json.dumps(value) for key, value in trial.point.params.items()},
            **trial.metrics,
            **{"measurements": len(trial.history), "trial_seconds": trial.seconds},
            "overhead_seconds": trial.overhead_seconds,
        }
        for trial in trials
    ]
    return write_table(storage.join(out, LEADERBOARD), rows)


def write_table(uri: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows, of which each has some of the columns."""
    columns = dict.fromkeys(name for row in rows for name in row)
    storage.write_table(uri, pa.table({name: [row.get(name) for row in rows] for name in columns}))
    return uri


def terminal(rows: Sequence[Row], objective: Sequence[str], most: int = 20) -> Table:
    """The best rows for a terminal."""
    names, best = measured(rows, objective), front(rows, objective)
    keys = list(dict.fromkeys(key for row in rows for key in row.params))
    shown = Table("", *(key.rpartition(".")[2] for key in keys), *(TITLES[name] for name in names), "seeds", "status")
    for place, row in enumerate(rows[:most], 1):
        values = [plain(row.params.get(key)) for key in keys] + [cell(row.estimate(name)) for name in names]
        shown.add_row(f"{place}{'★' if row in best else ''}", *values, str(len(row.trials)), row.status)
    caption = "★ not beaten in any objective; intervals: 95 %, over patients, or over seeds where there are several"
    shown.caption = caption + (f"; {len(rows) - most} more in {LEADERBOARD}" if len(rows) > most else "")
    return shown


def cell(estimate: Estimate | None, signed: bool = False) -> str:
    """A number with its interval, where it has one."""
    if estimate is None:
        return "–"
    form = "+.3g" if signed else ".3g"
    value = f"{estimate.value:{form}}"
    return value if estimate.low == estimate.high else f"{value} ({estimate.low:{form}} … {estimate.high:{form}})"


def plain(value: Any) -> str:
    """A value of the configuration as one types it."""
    return value if isinstance(value, str) else json.dumps(value)


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of `new` whose values are others than in `old`."""
    found: dict[str, Any] = {}
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            found |= changes(old[key], value, f"{prefix}{key}.")
        elif value != old.get(key):
            found[f"{prefix}{key}"] = value
    return found

"""Trials → what they say: repetitions together, ranked, the Pareto front, which values mattered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from scipy import stats

from mu2llm import storage
from mu2llm.config import Experiment
from mu2llm.records import Estimate
from mu2llm.stages.validation import METRICS
from mu2llm.sweeps.space import Params, Space
from mu2llm.sweeps.trial import DIRECTIONS, Trial, same

LEADERBOARD = "leaderboard.parquet"
TITLES = {
    "green": "GREEN",
    "finding_f1": "Findings F1",
    "visual_tokens": "visual tokens",
    "seconds_per_scan": "s a scan",
    "kl": "KL to the reference",
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
        found = [estimate for trial in ended if (estimate := trial.estimate(name))]
        return across([each.value for each in found]) if len(found) > 1 else found[0] if found else None

    def value(self, name: str) -> float | None:
        estimate = self.estimate(name)
        return estimate.value if estimate else None


def across(values: Sequence[float]) -> Estimate:
    """The mean of at least two repetitions with its 95 % t interval; n is how many there are."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread
    return Estimate(value=mean, low=mean - half, high=mean + half, n=len(values))


def ranked(trials: Sequence[Trial], objective: Sequence[str]) -> list[Row]:
    """Repetitions together; best first by the first objective, then what was stopped, then what gave nothing."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(same(trial.point), []).append(trial)
    first = objective[0]
    sign = -1 if DIRECTIONS[first] == "max" else 1

    def place(row: Row) -> tuple[int, float, int]:
        value = row.value(first)
        order = {"done": 0, "stopped": 1}.get(row.status, 2) if value is not None else 2
        return order, sign * (value or 0.0), row.trials[0].number

    return sorted((Row(tuple(group)) for group in groups.values()), key=place)


def front(rows: Sequence[Row], objective: Sequence[str]) -> list[Row]:
    """The finished rows that no other one beats in one objective without losing in another."""
    ended = [row for row in rows if row.status == "done" and all(row.value(name) is not None for name in objective)]
    signs = np.array([-1 if DIRECTIONS[name] == "max" else 1 for name in objective])
    costs = np.array([[row.value(name) for name in objective] for row in ended], float).reshape(-1, len(signs)) * signs
    beaten = [bool(((costs <= cost).all(1) & (costs < cost).any(1)).any()) for cost in costs]
    return [row for row, worse in zip(ended, beaten, strict=True) if not worse]


def winner(rows: Sequence[Row], objective: Sequence[str]) -> Row | None:
    """The best finished row by the first objective; among equals on it, one on the front."""
    on_front = front(rows, objective)
    return next((row for row in rows if row in on_front), None)


def importance(trials: Sequence[Trial], space: Space, name: str) -> dict[str, float]:
    """What share of the metric's variance among the better trials each key explains (PED-ANOVA); none of too few."""
    known = [trial for trial in trials if trial.value(name) is not None]
    if len(known) < 4 or len({trial.value(name) for trial in known}) < 2:
        return {}
    study = optuna.create_study(direction="maximize" if DIRECTIONS[name] == "max" else "minimize")
    for trial in known:
        study.add_trial(
            optuna.trial.create_trial(
                value=trial.value(name),
                params=space.encode(trial.point.params),
                distributions=space.distributions(),
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return found


def measured(rows: Sequence[Row], objective: Sequence[str]) -> list[str]:
    """The metrics to show: the objectives first, then the scores."""
    names = [*objective, *(name for name in METRICS if name not in objective)]
    return [name for name in names if any(row.value(name) is not None for row in rows)]


def parquet(trials: Sequence[Trial]) -> pa.Table:
    """One row a trial, in the order in which they ended; a key's column holds its value as JSON."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.point.params))
    metrics = list(dict.fromkeys(name for trial in trials for name in trial.metrics))
    rows: list[dict[str, Any]] = [
        {
            **{"trial": trial.id, "number": trial.number, "name": trial.point.name, "status": trial.status},
            **{"why": trial.why, "seed": trial.point.seed},
            **{key: json.dumps(trial.point.params[key]) if key in trial.point.params else None for key in keys},
            **{name: trial.metrics.get(name) for name in metrics},
            **{"measurements": len(trial.history), "trial_seconds": trial.seconds},
            "overhead_seconds": trial.overhead_seconds,
        }
        for trial in trials
    ]
    schema = [
        *[pa.field(name, pa.string()) for name in ("trial", "name", "status", "why", *keys)],
        *[pa.field(name, pa.int64()) for name in ("number", "seed", "measurements")],
        *[pa.field(name, pa.float64()) for name in (*metrics, "trial_seconds", "overhead_seconds")],
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(schema))


def write_parquet(out: str, trials: Sequence[Trial]) -> str:
    uri = storage.join(out, LEADERBOARD)
    with storage.staged(uri) as path:
        pq.write_table(parquet(trials), path)
    return uri


def terminal(rows: Sequence[Row], objective: Sequence[str], most: int = 20) -> Table:
    """The best rows for a terminal."""
    names = measured(rows, objective)
    keys = list(dict.fromkeys(key for row in rows for key in row.params))
    shown = Table("", *(key.rpartition(".")[2] for key in keys), *(TITLES[name] for name in names), "seeds", "status")
    best = front(rows, objective)
    for place, row in enumerate(rows[:most], 1):
        mark = "★" if row in best else ""
        values = [json.dumps(row.params.get(key)).strip('"') for key in keys]
        shown.add_row(
            f"{place}{mark}", *values, *(cell(row.estimate(n)) for n in names), str(len(row.trials)), row.status
        )
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


def command(stage: str, point: Mapping[str, Any], params: Params, experiment: Experiment, base: Experiment) -> str:
    """The command that trains this again: the preset, what the sweep's own configuration changed of it, the params."""
    changed = dict(_differences(base.model_dump(mode="json"), experiment.model_dump(mode="json")))
    settings = {key: value for key, value in {**changed, **params}.items() if not key.startswith(("sweep.", "name"))}
    settings = {key: value for key, value in settings.items() if stage != "dpo" or not key.startswith("preferences.")}
    sets = " ".join(f"--set {_quoted(key, value)}" for key, value in settings.items())
    return (
        f"mu2llm train {stage} --data {point['data']} --init {point['init']} --out winner --preset {experiment.name}"
        + (f" {sets}" if sets else "")
    )


def _quoted(key: str, value: Any) -> str:
    text = f"{key}={json.dumps(value)}" if not isinstance(value, str) else f"{key}={value}"
    return f"'{text}'" if any(letter in text for letter in " []{}\"'") else text


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Keys of `new` whose values are others than in `old`."""
    found: list[tuple[str, Any]] = []
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            found += _differences(before, value, f"{prefix}{key}.")
        elif value != before:
            found.append((f"{prefix}{key}", value))
    return found


def statuses(trials: Sequence[Trial]) -> dict[str, int]:
    """How many trials ended how."""
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial.status] = counts.get(trial.status, 0) + 1
    return counts

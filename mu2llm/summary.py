"""What a pipeline made, told: summary.json and the table that the terminal shows of it."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from mu2llm import tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.config import Experiment
from mu2llm.evaluation.results import TITLES, Results
from mu2llm.stages.preferences import Preferences

FILE = "summary.json"


def results_of(
    experiment: Experiment, checkpoints: dict[str, str], preferences: Preferences, results: Results
) -> dict[str, Any]:
    """The part of summary.json that tells of what was made: stages, pairs, evaluation."""
    training = {stage: open_checkpoint(uri).training for stage, uri in checkpoints.items()}
    matched = training["contrastive"].metrics
    return {
        "preset": experiment.name,
        "training": {stage: _numbers(each) for stage, each in training.items()},
        "contrastive": {
            **{name: matched.get(name) for name in ("recall_at_1", "recall_at_5", "chance_at_1")},
            "n": int(matched.get("recall_n", 0)),
        },
        "preferences": preferences.model_dump(exclude={"identity", "inputs", "shards", "checkpoint"}),
        **{run: results.summary(run) for run in ("sft", "dpo")},
        "dpo_minus_sft": results.difference("dpo", "sft"),
        "judge": results.judge,
        "seed": experiment.seed,
        "git_commit": tracking.git_commit(),
        "versions": tracking.versions(),
    }


def _numbers(training: Any) -> dict[str, Any]:
    losses = [entry["loss"] for entry in training.history]
    return {
        "steps": training.steps,
        "cases_seen": training.cases_seen,
        "seconds": training.seconds,
        "resumed_from_step": training.resumed_from_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "losses": losses,
    }


def table(summary: dict[str, Any]) -> Table:
    """The summary's numbers for a terminal: SFT, DPO and their paired difference, with 95 % intervals."""
    title = f"preset {summary['preset']}: {summary['seconds']['total']:.0f} s, {summary['peak_memory_gib']:.1f} GiB"
    shown = Table("", "SFT", "DPO", "DPO − SFT", title=title)
    for metric in ("finding_f1", "finding_f1_shuffled", "green", "bleu_1", "rouge_l"):
        runs = [_cell(summary[run].get(metric)) for run in ("sft", "dpo")]
        shown.add_row(TITLES.get(metric, metric), *runs, _cell(summary["dpo_minus_sft"].get(metric)))
    shown.add_row("distinct reports", *(f"{summary[run]['distinct_reports']:.2f}" for run in ("sft", "dpo")), "")
    for run in ("sft", "dpo"):
        if not summary[run]["audits"]["passed"]:
            shown.add_row(f"[red]{run}: {escape('; '.join(summary[run]['audits']['reasons']))}[/]")
    alias = summary["registered"]["alias"]
    best = f"registered {summary['registered']['run']} as version {summary['registered']['version']}"
    shown.caption = (
        f"{best}, {'champion' if alias else 'not as champion: no run passed its audit'}; judge {summary['judge']}"
    )
    return shown


def _cell(estimate: dict[str, float] | None) -> str:
    if not estimate:
        return "–"
    return f"{estimate['value']:.3f} [dim]{estimate['low']:.3f}…{estimate['high']:.3f}, n {estimate['n']}[/]"

"""`mu2llm promote`: a checkpoint becomes the registry's champion, once its evaluation says that it may.

A promoted checkpoint gets a model card, README.md in the format of the Hugging Face hub, from its own evaluations.
"""

from __future__ import annotations

import getpass
import shlex
from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from pydantic import BaseModel

from mu2llm import storage, tracking
from mu2llm.artefacts import open_checkpoint, weights_of
from mu2llm.config import validate
from mu2llm.errors import UserError
from mu2llm.evaluation import leaderboard
from mu2llm.evaluation.floors import Level
from mu2llm.evaluation.leaderboard import Row
from mu2llm.evaluation.results import TITLES
from mu2llm.records import Checkpoint, Estimate
from mu2llm.tracking import Alias

CARD = "README.md"
LIMITS = """\
- For research. Not a medical device; its reports are drafts for a radiologist's eye, not findings.
- The numbers hold for the data named with them, and for data like it, only.
- A score of the rules judge is not a score of GREEN-RadLlama2.
- It reads what its preprocessing spec lets through, of bodies like those that it was trained on; nothing else was
  tried. Rare findings are rare in its training data too: see the intervals.
- The licence is that of this project's code and of the language model's weights. The scans and reports that it was
  trained on have their own, which may allow research only (CT-RATE: CC BY-NC-SA 4.0)."""
LICENCES = {"small": "mit", "smollm2": "apache-2.0", "qwen/": "apache-2.0", "meta-llama/llama-3.2": "llama3.2"}
"""Language model (or how its name begins) → the hub's name for the licence of its weights; any other is `other`."""


class Promotion(BaseModel):
    """What the registry holds now: the alias, its version, and the version that had the alias before."""

    alias: Alias
    version: str
    checkpoint: str
    replaced: str | None
    forced: bool = False
    back: bool = False


def promote(checkpoint: str, alias: Alias = "champion", force: bool = False) -> Promotion:
    """Gives a checkpoint the alias, writes its model card and records who replaced what.

    Raises UserError where it does not write reports, where its spec is not the one that it was configured with, and,
    unless `force`, where it was never evaluated as it is now on held-out cases, or an audit has a red line: it does not
    look at the scan, too few cases are in a mean, or it is no better than what needs no model.
    """
    promoted = open_checkpoint(tracking.locate(checkpoint))
    rows = evaluations(promoted)
    _check_kind(promoted)
    reasons = _reasons(promoted, rows)
    if reasons and not force:
        raise UserError(f"{promoted.uri} is not promoted: {'; '.join(reasons)}. --force promotes it all the same")
    storage.write_bytes(storage.join(promoted.uri, CARD), card(promoted, rows).encode())
    replaced = tracking.version_of(alias)
    tags = {"replaced": replaced or "", "forced": "; ".join(reasons)}
    version = tracking.register(promoted, tracking.id_of(promoted.lineage.run), alias, tags)
    promotion = Promotion(
        alias=alias, version=version, checkpoint=tracking.place(promoted.uri), replaced=replaced, forced=bool(reasons)
    )
    return _record(promotion, tags["forced"])


def go_back(alias: Alias = "champion") -> Promotion:
    """Gives the alias back to the version that had it before; a UserError where there is none."""
    now = tracking.version_of(alias)
    if now is None:
        raise UserError(
            f"{tracking.shown(tracking.store())} has no {tracking.MODEL}@{alias}: there is nothing to go back from"
        )
    before = tracking.version_tags(now).get("replaced")
    if not before:
        raise UserError(f"version {now} was the first {alias}: there is nothing to go back to")
    checkpoint = tracking.source(before)
    tracking.set_alias(alias, before)
    return _record(Promotion(alias=alias, version=before, checkpoint=checkpoint, replaced=now, back=True))


def _record(promotion: Promotion, why: str = "") -> Promotion:
    """Who gave which alias to what, when: a run of the stage `promote`."""
    tags = {"by": getpass.getuser(), "checkpoint": promotion.checkpoint, "forced": why}
    values = promotion.model_dump(mode="json", exclude={"checkpoint", "forced"})
    tracking.end_stage(tracking.start_stage("promote", values, tags), {})
    return promotion


def evaluations(checkpoint: Checkpoint) -> list[Row]:
    """The rows of a checkpoint in the tracking store, newest first; not those of what was at its place before."""
    uri, weights = tracking.place(checkpoint.uri), weights_of(checkpoint).weights
    rows = leaderboard.tracked(tracking.tags("evaluate"))
    return [row for row in rows if row.checkpoint == uri and row.identity == weights]


def _check_kind(checkpoint: Checkpoint) -> None:
    lineage = checkpoint.lineage
    if lineage.stage == "contrastive":
        raise UserError(f"{checkpoint.uri} is of stage contrastive and writes no reports; promote one of sft or dpo")
    configured = validate(checkpoint.experiment).data.spec.hash
    if configured != lineage.spec_hash:
        raise UserError(
            f"{checkpoint.uri} was trained on spec {lineage.spec_hash} and is configured for {configured}: "
            "scans would be prepared otherwise than in training"
        )


def _reasons(checkpoint: Checkpoint, rows: Sequence[Row]) -> list[str]:
    held_out = [row for row in rows if row.split != "train"]
    if not held_out:
        evaluated = "no evaluation of it" if not rows else "evaluations of it on train alone"
        command = f"mu2llm evaluate --checkpoint {shlex.quote(checkpoint.uri)} --data … --out …"
        return [f"{tracking.shown(tracking.store())} has {evaluated} ({command})"]
    return [f"on {row.data}, {row.split}: {row.red_line}" for row in held_out if row.red_line]


# ---- the model card


def card(checkpoint: Checkpoint, rows: Sequence[Row]) -> str:
    """README.md: data, metrics with their intervals, audits, limits, licence."""
    lineage = checkpoint.lineage
    base = checkpoint.experiment.get("model", {}).get("language_model", "small")
    about = ModelCardData(
        license="cc-by-nc-sa-4.0" if "CC BY-NC-SA" in lineage.tower else _licence(base),
        language="en",
        library_name="mu2llm",
        pipeline_tag="image-to-text",
        tags=["radiology", "ct", "report-generation", lineage.stage],
        model_name=f"mu2llm-{lineage.stage}",
        eval_results=[result for row in rows for result in _eval_results(row)] or None,
    )
    facts = {
        "stage": lineage.stage,
        "language model": "small Llama, trained from scratch" if base == "small" else base,
        "vision tower and the licence of its weights": lineage.tower or None,
        "trained on": lineage.data,
        "checksum of the data": lineage.data_checksum,
        "preprocessing spec": lineage.spec_hash,
        "started from": lineage.parent,
        "preference judge": lineage.judge,
        "steps": checkpoint.training.steps,
        "cases seen": checkpoint.training.cases_seen,
        "seed": lineage.seed,
        "commit": lineage.git_commit,
        "tracked as run": lineage.run or None,
    }
    parts = [
        f"---\n{about.to_yaml()}\n---",
        f"# μ²LLM, {lineage.stage}",
        "Writes the report of a CT scan (arXiv 2507.00316).",
        "## Data and training",
        _table(("what", "value"), [(name, str(value)) for name, value in facts.items() if value is not None]),
        "## Metrics",
        *([_metrics(row) for row in rows] or ["It was never evaluated."]),
        "## Limits and licence",
        LIMITS,
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)  # parses its own header: a card that the hub could not read is an error here
    return text


def _licence(language_model: str) -> str:
    return next((name for begins, name in LICENCES.items() if language_model.lower().startswith(begins)), "other")


def _eval_results(row: Row) -> list[EvalResult]:
    """The row in the hub's model index."""
    return [
        EvalResult(
            task_type="image-to-text",
            task_name="Radiology report generation from CT",
            dataset_type="ct",
            dataset_name=row.data,
            dataset_split=row.split,
            metric_type=name,
            metric_name=TITLES.get(name, name),
            metric_value=round(number.value, 4),
        )
        for name, number in row.metrics.items()
        if isinstance(number, Estimate)
    ]


def _metrics(row: Row) -> str:
    numbers = [
        (TITLES.get(name, name), leaderboard.cell(number), str(number.n), *_bounds(row.levels.get(name)))
        for name, number in row.metrics.items()
        if isinstance(number, Estimate)
    ]
    audit = f"**Audit: {row.red_line}**" if row.red_line else "Audit passed: it looks at the scan."
    same = f"{row.split} ({row.split_hash})" if row.split_hash else row.split
    title = f"On `{row.data}`, split {same}, {row.cases} cases, judge {row.judge}; 95 % bootstrap intervals."
    head = ("metric", "value", "n", "floor: no model", "of the way up")
    notes = [f"- {note}" for note in row.notes]
    return "\n\n".join([title, _table(head, numbers), audit, *(["\n".join(notes)] if notes else [])])


def _bounds(level: Level | None) -> tuple[str, str]:
    return (f"{level.floor:.3f} ({level.of})", f"{level.share:.0%}") if level else ("–", "–")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)

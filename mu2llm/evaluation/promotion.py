"""`mu2llm promote`: a checkpoint becomes the registry's champion, once its evaluation says that it may.

A promoted checkpoint gets a model card, README.md in the format of the Hugging Face hub, from its own evaluations.
"""

from __future__ import annotations

import getpass
from collections.abc import Sequence
from typing import Literal

from huggingface_hub import ModelCard, ModelCardData
from pydantic import BaseModel

from mu2llm import storage, tracking
from mu2llm.config import validate
from mu2llm.errors import UserError
from mu2llm.evaluation import leaderboard
from mu2llm.evaluation.leaderboard import Row
from mu2llm.evaluation.results import TITLES
from mu2llm.records import Checkpoint, Estimate

Alias = Literal["champion", "challenger"]
CARD = "README.md"
LIMITS = """\
- For research. Not a medical device; its reports are drafts for a radiologist's eye, not findings.
- The numbers hold for the data named with them, and for data like it, only.
- A score of the rules judge is not a score of GREEN-RadLlama2."""


class Promotion(BaseModel):
    """What the registry holds now: the alias, its version, and the version that had the alias before."""

    alias: Alias
    version: str
    checkpoint: str
    replaced: str | None
    forced: bool = False


def promote(checkpoint: str, alias: Alias = "champion", force: bool = False) -> Promotion:
    """Gives a checkpoint the alias, writes its model card and records what it replaced.

    Raises UserError where it does not write reports, where its spec is not the one that it was configured with, and,
    unless `force`, where it was never evaluated or its audit has a red line.
    """
    made = Checkpoint.open(checkpoint)
    rows = evaluations(checkpoint)
    _check_kind(made)
    reasons = _reasons(checkpoint, rows)
    if reasons and not force:
        raise UserError(f"{checkpoint} is not promoted: {'; '.join(reasons)}. --force promotes it all the same")
    storage.write_bytes(storage.join(checkpoint, CARD), card(made, rows).encode())
    replaced = tracking.version_of(alias)
    tags = {"promoted_by": getpass.getuser(), "replaced": replaced or "", "forced": "; ".join(reasons)}
    version = tracking.register(made, alias=alias, tags=tags)
    return Promotion(alias=alias, version=version, checkpoint=checkpoint, replaced=replaced, forced=bool(reasons))


def go_back(alias: Alias = "champion") -> Promotion:
    """Gives the alias back to the version that had it before; a UserError where there is none."""
    now = tracking.version_of(alias)
    if now is None:
        raise UserError(f"{tracking.store()} has no {tracking.MODEL}@{alias}: there is nothing to go back from")
    before = tracking.version_tags(now).get("replaced")
    if not before:
        raise UserError(f"version {now} was the first {alias}: there is nothing to go back to")
    tracking.set_alias(alias, before)
    return Promotion(alias=alias, version=before, checkpoint=tracking.registered(alias), replaced=now)


def evaluations(checkpoint: str) -> list[Row]:
    """The rows of a checkpoint in the tracking store, newest first."""
    uri = storage.lasting(checkpoint)
    return [row for row in leaderboard.tracked(tracking.tags("evaluate")) if row.checkpoint in (uri, checkpoint)]


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


def _reasons(checkpoint: str, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return [
            f"{tracking.store()} has no evaluation of it (mu2llm evaluate --checkpoint {checkpoint} --data … --out …)"
        ]
    return [f"on {row.data}, {row.split}: {row.red_line}" for row in rows if row.red_line]


# ---- the model card


def card(checkpoint: Checkpoint, rows: Sequence[Row]) -> str:
    """README.md: data, metrics with their intervals, audits, limits, licence."""
    lineage = checkpoint.lineage
    base = checkpoint.experiment.get("model", {}).get("language_model", "small")
    about = ModelCardData(
        license="mit",
        language="en",
        library_name="mu2llm",
        tags=["radiology", "ct", "report-generation", lineage.stage],
    )
    facts = {
        "stage": lineage.stage,
        "language model": "small Llama, trained from scratch" if base == "small" else base,
        "trained on": lineage.data,
        "checksum of the data": lineage.data_checksum,
        "preprocessing spec": lineage.spec_hash,
        "started from": lineage.parent,
        "preference judge": lineage.judge,
        "steps": checkpoint.training.steps,
        "seed": lineage.seed,
        "commit": lineage.git_commit,
    }
    parts = [
        f"---\n{about.to_yaml()}\n---",
        f"# μ²LLM, {lineage.stage}",
        "Writes the report of a CT scan (arXiv 2507.00316).",
        "## Data and training",
        _table(("what", "value"), [(name, str(value)) for name, value in facts.items() if value is not None]),
        "## Metrics",
        *([_metrics(row) for row in rows] or ["It was never evaluated."]),
        "## Limits",
        LIMITS,
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)  # parses its own header: a card that the hub could not read is an error here
    return text


def _metrics(row: Row) -> str:
    numbers = [
        (TITLES.get(name, name), leaderboard.cell(number), str(number.n))
        for name, number in row.metrics.items()
        if isinstance(number, Estimate)
    ]
    audit = f"**Audit: {row.red_line}**" if row.red_line else "Audit passed: it looks at the scan."
    title = f"On `{row.data}`, split {row.split}, {row.cases} cases, judge {row.judge}; 95 % bootstrap intervals."
    return f"{title}\n\n{_table(('metric', 'value', 'n'), numbers)}\n\n{audit}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)

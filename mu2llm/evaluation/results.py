"""What an evaluation found, as it lies in metrics.json; what the command prints and the leaderboard shows of it."""

from __future__ import annotations

import shlex
from typing import Any, ClassVar, Self

import pyarrow as pa
from pydantic import BaseModel

from mu2llm import storage
from mu2llm.errors import UserError
from mu2llm.evaluation.audits import Audit
from mu2llm.evaluation.floors import Level
from mu2llm.records import Estimate

METRICS = "metrics.json"
Metrics = dict[str, Estimate | None]
REWORDED = 0.9
"""What a judge must give a reference in other words."""

TITLES = {
    "finding_f1": "Findings F1 (finding and side)",
    "finding_f1_any_side": "Findings F1 (any side)",
    "finding_precision": "Findings precision",
    "finding_recall": "Findings recall",
    "green": "GREEN",
    "green_matched_length": "GREEN at matched length",
    "green_length_correlation": "GREEN and words, correlation",
    "ce_macro_f1": "18 labels, macro F1",
    "ce_micro_f1": "18 labels, micro F1",
    "crg": "CRG",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "bleu_mean": "BLEU, mean of 1–4",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "bert_score": "BERTScore",
    "laterality": "Laterality agreement",
    "crimson": "CRIMSON",
}
"""How metrics are called where people read them, in the order of tables."""
JUDGED = {"green", "crimson"}
"""What judges measure."""


class Group(BaseModel):
    """The metrics of one finding, one label or one region of the body; `n` cases of the truth have it."""

    name: str
    n: int
    metrics: Metrics


class RunResult(BaseModel):
    """One run's results; `levels` say where its metrics stand between floor and ceiling."""

    metrics: Metrics
    levels: dict[str, Level] = {}
    audit: Audit
    findings: list[Group]
    labels: list[Group]
    regions: list[Group]
    green: list[float | None]


class Difference(BaseModel):
    """metrics(ours) − metrics(theirs) on the same cases, paired."""

    ours: str
    theirs: str
    metrics: Metrics


class Header(BaseModel):
    """request.json: what the saved predictions are of. `identity` is the digest of `inputs`, all that decided them;
    `identities` are the digests of the checkpoints' weights; `histories` is what each stage logged while it trained.
    `foreign` is the URI of predictions that were not written here, `unmatched` the ids that did not fit, by reason."""

    FILE: ClassVar[str] = "request.json"
    identity: str
    inputs: dict[str, Any] = {}
    checkpoints: dict[str, str]
    identities: dict[str, str] = {}
    data: str
    split: str
    question: str
    foreign: str = ""
    unmatched: dict[str, list[str]] = {}
    seed: int
    prior: str
    histories: dict[str, list[dict[str, float]]]

    @classmethod
    def there(cls, out: str) -> bool:
        return storage.exists(storage.join(out, cls.FILE))

    @classmethod
    def open(cls, out: str) -> Self:
        """A UserError where no evaluation has finished writing its predictions."""
        if not cls.there(out):
            raise UserError(
                f"{out} holds no finished predictions (no {cls.FILE}); run mu2llm evaluate --out {shlex.quote(out)}"
            )
        return cls.model_validate(storage.read_json(storage.join(out, cls.FILE)))

    def write(self, out: str) -> None:
        storage.write_json(storage.join(out, self.FILE), self.model_dump(mode="json"))


class Results(BaseModel):
    """metrics.json. `truth` says what the findings were compared with; `notes` what metrics need to be comparable.

    `scored_by` is what decided the scores, as inputs of an identity, `pages` how many cases the report shows. `split`
    is the name of the cases, `split_hash` what other scores of the same cases share, `floors` what needs no model.
    `paraphrase` is what the judge gives references that say the same in other words, `measures` the metric of
    its scores, `external` are the metrics of other programs.
    """

    format_version: int = 1
    scored_by: dict[str, Any] = {}
    pages: int | None = None
    header: Header
    cases: int
    split: str = ""
    split_hash: str = ""
    judge: str
    measures: str = "green"
    truth: str
    notes: dict[str, str]
    external: list[str] = []
    floors: dict[str, Metrics] = {}
    paraphrase: Estimate | None = None
    runs: dict[str, RunResult]
    differences: list[Difference]

    @classmethod
    def open(cls, out: str) -> Self:
        """The results in a folder that `evaluate` wrote."""
        path = storage.join(out, METRICS)
        if not storage.exists(path):
            raise UserError(
                f"{out} holds no evaluation: it has no {METRICS}; run mu2llm evaluate --out {shlex.quote(out)}"
            )
        return cls.model_validate(storage.read_json(path))

    def summary(self, run: str) -> dict[str, Any]:
        """One run flat, as `mu2llm evaluate --json` prints it and the demo's summary.json holds it."""
        result = self.runs[run]
        flat: dict[str, Any] = {name: value.model_dump() if value else None for name, value in result.metrics.items()}
        for variant, contrasts in result.audit.contrasts.items():
            for metric, contrast in contrasts.items():
                flat[f"{metric}_{variant}"] = contrast.without.model_dump()
        flat["distinct_reports"] = result.audit.distinct_reports
        flat["audits"] = {**result.audit.model_dump(), "red_line": result.audit.red_line}
        of = {"checkpoint": self.header.checkpoints.get(run), "data": self.header.data, "split": self.header.split}
        told = self.paraphrase.model_dump() if self.paraphrase else None
        by = {"paraphrase": told, "judge": self.judge, "truth": self.truth, "notes": self.notes}
        return {**flat, **of, "cases": self.cases, **self.bounds(run), **by}

    @property
    def others(self) -> list[str]:
        """Metrics that not all evaluations have: what the judge measures where that is not GREEN, and external ones."""
        return [*([] if self.measures == "green" else [self.measures]), *self.external]

    @property
    def judge_warning(self) -> str:
        """What there is to say against the judge; empty where it takes rewording for what it is."""
        if self.paraphrase is None or self.paraphrase.value >= REWORDED:
            return ""
        told = f"{self.paraphrase.value:.2f} for {self.paraphrase.n} references against themselves in other words"
        return f"the judge punishes harmless rewording: {told}"

    def bounds(self, run: str) -> dict[str, Any]:
        """What stands beside a run's metrics: the split's hash, floors, shares of the way to the ceiling."""
        levels = self.runs[run].levels
        values = {
            floor: {name: estimate.value for name, estimate in metrics.items() if estimate}
            for floor, metrics in self.floors.items()
        }
        return {
            "split_name": self.split,
            "split_hash": self.split_hash,
            "floors": values,
            "shares": {name: level.share for name, level in levels.items()},
            "below_floor": [name for name, level in levels.items() if level.below],
        }

    def difference(self, ours: str, theirs: str) -> dict[str, dict[str, float] | None]:
        """The paired differences of two runs by metric."""
        found = next(each for each in self.differences if (each.ours, each.theirs) == (ours, theirs))
        return {name: value.model_dump() if value else None for name, value in found.metrics.items()}

    def table(self) -> pa.Table:
        """Every number as a row: run, group (all, finding, label, region, floor, difference), name, metric, value …"""
        rows = []
        for run, result in self.runs.items():
            groups = {"finding": result.findings, "label": result.labels, "region": result.regions}
            rows += _rows(run, "all", "", result.metrics)
            for group, members in groups.items():
                for member in members:
                    rows += _rows(run, group, member.name, member.metrics)
        for floor, metrics in self.floors.items():
            rows += _rows(floor, "floor", "", metrics)
        for each in self.differences:
            rows += _rows(each.ours, "difference", each.theirs, each.metrics)
        texts = [pa.field(name, pa.string()) for name in ("run", "group", "name", "metric")]
        numbers = [pa.field(name, pa.float64()) for name in ("value", "low", "high")]
        return pa.Table.from_pylist(rows, schema=pa.schema([*texts, *numbers, pa.field("n", pa.int64())]))


def _rows(run: str, group: str, name: str, metrics: Metrics) -> list[dict[str, Any]]:
    head = {"run": run, "group": group, "name": name}
    return [{**head, "metric": metric, **value.model_dump()} for metric, value in metrics.items() if value]

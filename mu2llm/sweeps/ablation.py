"""`mu2llm ablation`: the paper's Table 2 as one experiment, with seeds and intervals, and its few-shot claim.

Every variant trains SFT from the same contrastive checkpoint; `all` goes on with DPO on pairs of its own reports. Where
contrast was on findings there is a row that the paper has not: `all` with the diagnostic prior. With `fractions` the
baseline, `all` and its DPO are trained on a part of the training patients too. What was trained is not trained again.
Below `out`: the studies (study.py), sft/, preferences/, dpo/, ablation.parquet, .json, .html, .png.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel
from rich.table import Table

from mu2llm import storage
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.errors import Failure, UserError
from mu2llm.evaluation import published
from mu2llm.evaluation.bert_score import BertScore
from mu2llm.evaluation.bootstrap import Bootstrap, Statistic
from mu2llm.evaluation.scoring import Texts, embedded
from mu2llm.evaluation.text_metrics import text_metrics
from mu2llm.green import Judge, load_judge
from mu2llm.progress import Steps
from mu2llm.records import Case, Estimate
from mu2llm.settings.stages import FINDINGS
from mu2llm.stages import contrastive
from mu2llm.stages.job import Watch
from mu2llm.stages.preferences import prefer
from mu2llm.stages.texts import findings_of
from mu2llm.stages.validation import statistics
from mu2llm.sweeps import charts, page
from mu2llm.sweeps.results import TITLES, cell, write_table
from mu2llm.sweeps.runner import concurrency, run_trials
from mu2llm.sweeps.space import Params, apply
from mu2llm.sweeps.study import Study, database
from mu2llm.sweeps.sweep import (
    check_contrastive,
    check_inputs,
    checksum,
    prepare_features,
    prepare_reference,
    quiet,
)
from mu2llm.sweeps.trial import Plan, Point, Trial

BASELINE: Params = {
    "model.tokenizer.attention": "absolute",
    "model.tokenizer.selection": "top_k",
    "model.tokenizer.pooling": "static",
    "model.tokenizer.prior": 0,
}
PARTS: dict[str, Params] = {
    "+RPE": {"model.tokenizer.attention": "relative_3d"},
    "+DTS": {"model.tokenizer.selection": "differentiable"},
    "+DMTP": {"model.tokenizer.pooling": "dynamic"},
}
ALL = {key: value for part in PARTS.values() for key, value in part.items()}
VARIANTS = {"baseline": BASELINE, **{name: BASELINE | part for name, part in PARTS.items()}, "all": BASELINE | ALL}
DPO, PRIOR = "all + DPO", "all + prior"
MOST_FINDINGS = 32
"""That a prior tells of: the most frequent."""
METRICS = ("finding_f1", "green", "bleu_1", "rouge_1", "meteor", "bert_score")
PUBLISHED = dict(zip([*VARIANTS, DPO], published.ablation(), strict=True))
"""The paper's row of each variant."""
NOTE = (
    "Our baseline attends over the tokens, as the paper describes. That of the published code attends over the batch "
    "(nn.MultiheadAttention without batch_first: over the chunks, and in the aggregation over a single element, which "
    "does nothing), and its +RPE mends this along with the positions. So the paper's gain of +RPE over the baseline, "
    "0.204 → 0.277 GREEN, is of both together; ours is of the positions alone. The paper's figures are of AMOS-MM with "
    "a 1B language model, ours of the data named here: compare the order of the rows, not the numbers."
)
Key = tuple[str, float, int]
"""(variant, fraction of the training patients, seed)"""
Seeds = dict[int, dict[str, Statistic]]
"""Seed → what its reports are worth"""


class Cell(BaseModel):
    """A variant on a fraction of the training patients: metrics over its seeds, and minus the baseline there."""

    variant: str
    fraction: float
    seeds: list[int]
    metrics: dict[str, Estimate | None]
    minus_baseline: dict[str, Estimate | None]
    published: dict[str, float | None] = {}
    missing: list[str] = []


@dataclass(frozen=True)
class Ablation:
    """What is trained, from where, and how often."""

    experiment: Experiment
    data: str
    init: str
    out: str
    seeds: int
    fractions: tuple[float, ...]
    prior: int = 0
    """Findings of the row with a diagnostic prior; 0: there is none."""

    def plan(self, stage: str) -> Plan:
        """What the trials of sft or of dpo share; the checkpoint to start from is there by then."""
        return Plan(
            **{"kind": "ablation", "stage": stage, "experiment": self.experiment.model_dump(mode="json")},
            **{"data": self.data, "init": self.init, "shards": self.data, "out": self.out},
            checksum=checksum(Shards.open(self.data).checksum, open_checkpoint(self.init)),
            folder=f"{stage}/trials",
            watch=Watch(times=1, split="test"),
        )

    def points(self) -> list[Point]:
        """Of SFT, in such an order that an interrupted ablation has whole seeds."""
        return [
            Point(
                params=params | ({} if fraction == 1 else {"data.fraction": fraction}),
                **{"seed": seed, "name": name, "keep": name == "all"},
            )
            for seed in range(self.experiment.seed, self.experiment.seed + self.seeds)
            for name, params in self.variants.items()
            for fraction in (self.fractions if name in ("baseline", "all") else (1.0,))
        ]

    @property
    def variants(self) -> dict[str, Params]:
        """The paper's, and that with the prior where there is one."""
        return VARIANTS | ({PRIOR: VARIANTS["all"] | {"model.tokenizer.prior": self.prior}} if self.prior else {})


def run(
    data: str,
    init: str | None,
    out: str,
    experiment: Experiment,
    seeds: int = 3,
    fractions: Sequence[float] = (1.0,),
    show: Steps = quiet,
) -> dict[str, Any]:
    """Trains what is not trained yet and writes the table; what the command prints.

    Without `init` it trains the contrastive checkpoint too, once for all variants. Raises UserError where nothing can
    start, Failure where no variant could be trained.
    """
    ablation = plan(data, init, out, experiment, seeds, fractions)
    for stage in (experiment.sft, experiment.dpo):
        concurrency(stage, experiment.sweep)
    if init is None:
        contrastive.run(data, ablation.init, experiment, None, partial(_followed, show))
    prepare_features(experiment, ablation.data, ablation.init)
    kept, start = database(ablation.out), Point(seed=experiment.seed)
    found: dict[Key, list[str]] = {}
    missing: dict[Key, str] = {}

    def train(stage: str, points: Sequence[Point]) -> list[Trial]:
        made = ablation.plan(stage)
        study = Study(kept, f"{stage}-{made.identity}", ["green"], start)
        missing.update({_key(point): "not run in the time that was given" for point in points})
        trials = run_trials(made, study, points, partial(show, stage))
        missing.update({_key(trial.point): trial.why for trial in trials})
        done = [trial for trial in trials if trial.status == "done"]
        found.update({_key(trial.point): made.reports(trial.point) for trial in done})
        return done

    points = []
    whole = [trial for trial in train("sft", ablation.points()) if trial.point.name == "all"]
    for number, trial in enumerate(whole, 1):
        try:
            points.append(_prefer(ablation, trial))
        except Failure as error:
            missing[DPO, *_key(trial.point)[1:]] = str(error)
        show("preferences", number, len(whole), {})
    train("dpo", points)
    missing = {key: why for key, why in missing.items() if key not in found}
    cases, judge = Shards.open(data).cases("test"), load_judge(experiment.judge)
    bootstrap = Bootstrap([case.patient for case in cases], experiment.evaluation.bootstrap, experiment.seed)
    encoder = BertScore(experiment.evaluation.text_encoder, experiment.evaluation)
    cells = measure(cases, found, missing, judge, encoder, bootstrap)
    return _write(ablation.out, cells, {"cases": len(cases), "judge": judge.identity}, missing)


def plan(
    data: str, init: str | None, out: str, experiment: Experiment, seeds: int = 3, fractions: Sequence[float] = (1.0,)
) -> Ablation:
    """What would be trained; a UserError where data, checkpoint and fractions do not fit together."""
    shards = Shards.open(data)
    if init:
        parent = open_checkpoint(init)
        check_contrastive(parent, "an ablation")
        check_inputs(shards, parent, experiment, {"test"})
    elif not shards.count("test"):
        raise UserError(f"{shards.uri} has no rows in split test, on which trials are measured")
    if not fractions or any(not 0 < fraction <= 1 for fraction in fractions):
        given = ", ".join(map(str, fractions))
        raise UserError(f"--fractions {given}: give fractions above 0 and up to 1, such as 0.1,0.3,1")
    positives = parent.experiment["contrastive"]["positives"] if init else experiment.contrastive.positives
    reports = [case.report for case in shards.cases("train")] if experiment.sft.freeze_vision else []
    findings = {each for report in reports if positives in FINDINGS for each in findings_of(report, positives)}
    prior = min(MOST_FINDINGS, len(findings))
    init, out = storage.absolute(init or storage.join(out, "contrastive")), storage.absolute(out)
    return Ablation(experiment, shards.uri, init, out, seeds, tuple(sorted({*fractions, 1.0})), prior)


def _followed(show: Steps, numbers: dict[str, float]) -> None:
    show("contrastive", numbers.get("step", 0), numbers["total"], numbers)


def _key(point: Point) -> Key:
    return point.name, float(point.params.get("data.fraction", 1.0)), point.seed


def _prefer(ablation: Ablation, trial: Trial) -> Point:
    """The pairs of an `all` checkpoint as a point to train, on the whole cluster; a Failure where there are none.

    Reference log-probabilities and features are made here too, so that a trial needs nothing but its own process.
    """
    data, init = f"preferences/{trial.id}", f"sft/trials/{trial.id}/checkpoint"
    pairs, checkpoint = storage.join(ablation.out, data), storage.join(ablation.out, init)
    experiment = apply(ablation.experiment, {**trial.point.params, "seed": trial.point.seed})
    prefer(checkpoint, ablation.data, pairs, experiment)
    prepare_reference(experiment, pairs, checkpoint, ablation.out)
    return trial.point.model_copy(update={"data": data, "init": init, "name": DPO, "keep": False})


# ---- what it says


def measure(
    cases: Sequence[Case],
    found: Mapping[Key, Sequence[str]],
    missing: Mapping[Key, str],
    judge: Judge,
    encoder: BertScore,
    bootstrap: Bootstrap,
) -> list[Cell]:
    """Reports of the same cases by what wrote them → every variant's metrics over its seeds, and minus the baseline's.

    Intervals are over seeds and patients, the differences paired by both. A Failure where there are no reports.
    """
    if not found:
        raise Failure(f"no variant could be trained, such as: {next(iter(missing.values()), 'none was started')}")
    texts = {key: Texts(tuple(cases), tuple(c.report for c in cases), tuple(each)) for key, each in found.items()}
    similar = embedded({str(key): each for key, each in texts.items()}, encoder)
    groups: dict[tuple[str, float], Seeds] = {}
    for (name, fraction, seed), each in texts.items():
        scores = {**statistics(list(cases), list(each.candidates), judge), **text_metrics(each.pairs)}
        scores["bert_score"] = similar[str((name, fraction, seed))]
        groups.setdefault((name, fraction), {})[seed] = scores
    order = [*VARIANTS, DPO, PRIOR]
    return [
        Cell(
            variant=name,
            fraction=fraction,
            seeds=sorted(seeds),
            metrics={m: bootstrap.over_seeds([each[m] for each in seeds.values()]) for m in METRICS},
            minus_baseline={
                m: _difference(seeds, groups.get(("baseline", fraction), {}), m, bootstrap) for m in METRICS
            },
            published=PUBLISHED.get(name, {}) if fraction == 1 else {},
            missing=[why for key, why in missing.items() if key[:2] == (name, fraction)],
        )
        for (name, fraction), seeds in sorted(
            groups.items(), key=lambda group: (order.index(group[0][0]), -group[0][1])
        )
    ]


def _difference(ours: Seeds, theirs: Seeds, metric: str, bootstrap: Bootstrap) -> Estimate | None:
    """ours − theirs on the same patients, over the seeds that both have."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds or ours is theirs:
        return None
    return bootstrap.difference_over_seeds(*([side[seed][metric] for seed in seeds] for side in (ours, theirs)))


def _write(out: str, cells: Sequence[Cell], about: dict[str, Any], missing: Mapping[Key, str]) -> dict[str, Any]:
    """The table, the page, the picture and ablation.json, which is what the command prints."""
    found = {
        **{"cells": [each.model_dump() for each in cells], "split": "test", **about, "note": NOTE},
        "missing": {"/".join(map(str, key)): why for key, why in missing.items()},
        "page": storage.join(out, "ablation.html"),
    }
    rows = [
        {"variant": each.variant, "fraction": each.fraction, "seeds": len(each.seeds), "metric": metric, "what": what}
        | (estimate.model_dump() if estimate else {})
        | {"published": each.published.get(metric) if what == "value" else None}
        for each in cells
        for what, metrics in (("value", each.metrics), ("minus baseline", each.minus_baseline))
        for metric, estimate in metrics.items()
    ]
    write_table(storage.join(out, "ablation.parquet"), rows)
    storage.write_json(storage.join(out, "ablation.json"), found)
    write_page(out, cells, found)
    return found


def write_page(out: str, cells: Sequence[Cell], found: dict[str, Any]) -> None:
    """Writes ablation.html and ablation.png."""
    whole = [each for each in cells if each.fraction == 1]
    green = {each.variant: each.metrics["green"] for each in whole}
    picture = charts.intervals(green, "GREEN", {each.variant: each.published.get("green") for each in whole})
    names = dict.fromkeys(each.variant for each in cells if each.fraction < 1)
    points = {name: [(each.fraction, each.metrics) for each in cells if each.variant == name] for name in names}
    shown = {"Fractions of the training patients": charts.few_shot(points) if points else ""}
    page.write(out, "ablation", picture, shown, cells=cells, found=found, names=METRICS)


def terminal(cells: Sequence[Cell], found: dict[str, Any]) -> Table:
    """The table for a terminal."""
    shown = Table(
        "",
        "patients",
        "seeds",
        *(TITLES[name] for name in METRICS),
        "F1 − baseline",
        "GREEN − baseline",
        "paper: GREEN",
    )
    for each in cells:
        values = [cell(each.metrics[name]) for name in METRICS]
        values += [cell(each.minus_baseline[name], signed=True) for name in ("finding_f1", "green")]
        paper = each.published.get("green")
        shown.add_row(each.variant, f"{each.fraction:.0%}", str(len(each.seeds)), *values, f"{paper}" if paper else "–")
    shown.caption = (
        f"{found['cases']} test cases, judge {found['judge']}; intervals 95 %: over seeds and patients, drawn crosswise"
    )
    return shown

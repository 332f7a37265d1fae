"""`mu2llm ablation`: the paper's Table 2 as one experiment, with seeds and intervals, and its few-shot claim.

Every variant trains SFT from the same contrastive checkpoint; the last one goes on with DPO on pairs of its own
reports. With `fractions` the last two are trained on a part of the training patients too. What was trained is not
trained again. Below `out`: sft/, preferences/, dpo/, ablation.parquet, ablation.json, ablation.html, ablation.png.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from mu2llm import artefacts, storage, tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.errors import Failure, UserError
from mu2llm.evaluation.bootstrap import Bootstrap, Statistic
from mu2llm.evaluation.last_layer import LastLayer
from mu2llm.evaluation.published import TABLE_2
from mu2llm.evaluation.scoring import Texts, embedded
from mu2llm.evaluation.text_metrics import text_metrics
from mu2llm.green import load_judge
from mu2llm.records import Case, Estimate
from mu2llm.stages import contrastive, dpo
from mu2llm.stages.job import Watch, check_parent, new_job
from mu2llm.stages.preferences import prefer, read_pairs
from mu2llm.stages.validation import statistics
from mu2llm.sweeps.ablation_page import write_page, write_plot
from mu2llm.sweeps.final import pooled, read_reports
from mu2llm.sweeps.results import across
from mu2llm.sweeps.runner import concurrency, run_points
from mu2llm.sweeps.space import Params, apply
from mu2llm.sweeps.sweep import Show
from mu2llm.sweeps.tokenizer import check_spec
from mu2llm.sweeps.tokenizer import share as encode_once
from mu2llm.sweeps.trial import Plan, Point, Trial

BASELINE: Params = {
    "model.tokenizer.attention": "absolute",
    "model.tokenizer.selection": "top_k",
    "model.tokenizer.pooling": "static",
}
RPE: Params = {"model.tokenizer.attention": "relative_3d"}
DTS: Params = {"model.tokenizer.selection": "differentiable"}
DMTP: Params = {"model.tokenizer.pooling": "dynamic"}
VARIANTS: dict[str, Params] = {
    "baseline": BASELINE,
    "+RPE": {**BASELINE, **RPE},
    "+DTS": {**BASELINE, **DTS},
    "+DMTP": {**BASELINE, **DMTP},
    "all": {**BASELINE, **RPE, **DTS, **DMTP},
}
DPO = "all + DPO"
PUBLISHED = dict(zip([*VARIANTS, DPO], TABLE_2.values(), strict=True))
"""The paper's row of each variant."""
METRICS = ("finding_f1", "green", "bleu_1", "rouge_1", "meteor", "bert_score")
OF_TABLE_2 = ("bleu_1", "rouge_1", "meteor", "bert_score", "green")
NOTE = (
    "Our baseline attends over the tokens, as the paper describes. That of the published code attends over the batch "
    "(nn.MultiheadAttention without batch_first: over the chunks, and in the aggregation over a single element, which "
    "does nothing), and its +RPE mends this along with the positions. So the paper's gain of +RPE over the baseline, "
    "0.204 → 0.277 GREEN, is of both together; ours is of the positions alone. The paper's figures are of AMOS-MM with "
    "a 1B language model, ours of the data named here: compare the order of the rows, not the numbers."
)


class Cell(BaseModel):
    """A variant on a share of the training patients: metrics over its seeds, and minus those of the baseline."""

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
    shards: Shards
    init: str
    out: str
    seeds: int
    fractions: tuple[float, ...]

    @property
    def checksum(self) -> str:
        return artefacts.digest([self.shards.checksum, open_checkpoint(self.init).lineage.identity])

    def plan(self, stage: Literal["sft", "dpo"]) -> Plan:
        store = tracking.store()
        values = self.experiment.model_dump(mode="json", exclude={"sweep"})
        return Plan(
            stage=stage,
            experiment=self.experiment.model_dump(mode="json"),
            out=storage.join(self.out, stage),
            watch=Watch(times=1, split="test"),
            identity=artefacts.digest([values, self.checksum]),
            store=store if store.startswith("sqlite:") else None,
        )

    def shares(self, variant: str) -> tuple[float, ...]:
        return self.fractions if variant in ("all", DPO) else (1.0,)

    def sft_points(self) -> list[Point]:
        """In such an order that an interrupted ablation has whole seeds."""
        seeds = range(self.experiment.seed, self.experiment.seed + self.seeds)
        return [self._point(name, seed, share) for seed in seeds for name in VARIANTS for share in self.shares(name)]

    def _point(self, name: str, seed: int, share: float) -> Point:
        params = {**VARIANTS[name], **({} if share == 1 else {"data.fraction": share})}
        keep = name == "all"
        return Point(params=params, seed=seed, data=self.shards.uri, init=self.init, name=name, keep=keep)


def run(
    data: str,
    init: str | None,
    out: str,
    experiment: Experiment,
    seeds: int = 3,
    fractions: Sequence[float] = (1.0,),
    show: Show | None = None,
) -> dict[str, Any]:
    """Trains what is not trained yet and writes the table; what the command prints.

    Without `init` it trains the contrastive checkpoint too, once for all variants. Raises UserError where nothing can
    start, Failure where no variant could be trained.
    """
    ablation = plan(data, init, out, experiment, seeds, fractions)
    for stage in (experiment.sft, experiment.dpo):
        concurrency(stage, experiment.sweep)
    if init is None:
        contrastive.run(data, ablation.init, experiment, None, _follower("contrastive", show))
    encode_once(experiment, ablation.shards, ablation.init)
    trials = run_points(ablation.plan("sft"), ablation.sft_points(), experiment.sweep, _teller("sft", show))
    points, missing = _prefer(ablation, trials, show)
    trained = run_points(ablation.plan("dpo"), points, experiment.sweep, _teller("dpo", show)) if points else []
    missing |= {_key(trial.point): trial.why for trial in [*trials, *trained] if trial.status != "done"}
    cells = measure(ablation, [*trials, *trained], missing)
    found = {
        "cells": [cell.model_dump() for cell in cells],
        "split": "test",
        "cases": ablation.shards.count("test"),
        "judge": load_judge(experiment.judge).identity,
        "note": NOTE,
        "missing": {"/".join(map(str, key)): why for key, why in missing.items()},
        "page": storage.join(ablation.out, "ablation.html"),
    }
    _write_table(storage.join(ablation.out, "ablation.parquet"), cells)
    storage.write_json(storage.join(ablation.out, "ablation.json"), found)
    write_plot(ablation.out, cells)
    write_page(ablation.out, cells, found)
    return found


def plan(
    data: str, init: str | None, out: str, experiment: Experiment, seeds: int = 3, fractions: Sequence[float] = (1.0,)
) -> Ablation:
    """What would be trained; a UserError where data, checkpoint and fractions do not fit together."""
    shards = Shards.open(data)
    if init:
        parent = open_checkpoint(init)
        if parent.lineage.stage != "contrastive":
            raise UserError(
                f"{init} is of stage {parent.lineage.stage}; an ablation starts from a contrastive checkpoint"
            )
        check_spec(shards, parent, experiment)
        check_parent(parent, experiment)
    init = init or storage.join(out, "contrastive")
    if not shards.count("test"):
        raise UserError(f"{shards.uri} has no rows in split test, on which the ablation is measured")
    wrong = [share for share in fractions if not 0 < share <= 1]
    if wrong or not fractions:
        raise UserError(
            f"--fractions {', '.join(map(str, fractions))}: give shares above 0 and up to 1, such as 0.1,0.3,1"
        )
    shares = tuple(sorted({*fractions, 1.0}))
    return Ablation(experiment, shards, storage.absolute(init), storage.absolute(out), seeds, shares)


Key = tuple[str, float, int]


def _key(point: Point) -> Key:
    """(variant, share of the patients, seed)."""
    return point.name, float(point.params.get("data.fraction", 1.0)), point.seed


def _prefer(ablation: Ablation, trials: Sequence[Trial], show: Show | None) -> tuple[list[Point], dict[Key, str]]:
    """The pairs of each `all` checkpoint, one after another on the whole cluster, as points to train; why some are not.

    Reference log-probabilities and features are made here too, so that a trial needs nothing but its own process.
    """
    sft, own = ablation.plan("sft"), [trial for trial in trials if trial.point.name == "all" and trial.status == "done"]
    points: list[Point] = []
    missing: dict[Key, str] = {}
    for number, trial in enumerate(own, 1):
        checkpoint = storage.join(sft.place(trial.point), "checkpoint")
        pairs = storage.join(ablation.out, "preferences", trial.id)
        experiment = apply(ablation.experiment, {**trial.point.params, "seed": trial.point.seed})
        kept = {"data": pairs, "init": checkpoint, "name": DPO, "keep": False}
        point = trial.point.model_copy(update=kept)
        try:
            prefer(checkpoint, ablation.shards.uri, pairs, experiment)
            made = read_pairs(pairs)
            shared = new_job("dpo", ablation.shards, ablation.out, experiment, checkpoint, data=pairs, rows=len(made))
            dpo.prepared(shared.model_copy(update={"shards": ablation.shards.uri}), ablation.shards, made)
            points.append(point)
        except Failure as error:
            missing[_key(point)] = str(error)
        if show:
            show("preferences", number, len(own), {})
    return points, missing


# ---- measuring


def measure(ablation: Ablation, trials: Sequence[Trial], missing: dict[Key, str]) -> list[Cell]:
    """Every variant's metrics over its seeds, and its paired difference to the baseline."""
    cases = ablation.shards.cases("test")
    found = _statistics(ablation, cases, [trial for trial in trials if trial.status == "done"])
    settings = ablation.experiment.evaluation
    bootstrap = Bootstrap([case.patient for case in cases], settings.bootstrap, ablation.experiment.seed)
    groups: dict[tuple[str, float], dict[int, dict[str, Statistic]]] = {}
    for (name, share, seed), measured in found.items():
        groups.setdefault((name, share), {})[seed] = measured
    if not groups:
        raise Failure(f"no variant could be trained, such as: {next(iter(missing.values()), 'none was started')}")
    baseline = groups.get(("baseline", 1.0), {})
    order = [(name, share) for name in [*VARIANTS, DPO] for share in reversed(ablation.shares(name))]
    return [
        Cell(
            variant=name,
            fraction=share,
            seeds=sorted(groups[name, share]),
            metrics={metric: _over_seeds(groups[name, share], metric, bootstrap) for metric in METRICS},
            minus_baseline={m: _difference(groups[name, share], baseline, m, bootstrap) for m in METRICS},
            published=dict(zip(OF_TABLE_2, PUBLISHED[name], strict=True)) if share == 1 else {},
            missing=[why for key, why in missing.items() if key[:2] == (name, share)],
        )
        for name, share in order
        if (name, share) in groups
    ]


def _statistics(ablation: Ablation, cases: list[Case], trials: Sequence[Trial]) -> dict[Key, dict[str, Statistic]]:
    judge = load_judge(ablation.experiment.judge)
    encoder = LastLayer(ablation.experiment.evaluation.text_encoder)
    texts = {}
    for trial in trials:
        stage: Literal["sft", "dpo"] = "dpo" if trial.point.name == DPO else "sft"
        reports = tuple(read_reports(ablation.plan(stage), trial.point))
        texts[_key(trial.point)] = Texts(tuple(cases), tuple(case.report for case in cases), reports)
    similar = embedded({str(key): each for key, each in texts.items()}, encoder) if texts else {}
    return {
        key: {
            **statistics(cases, list(each.candidates), judge),
            **{name: value for name, value in text_metrics(each.pairs).items() if name in METRICS},
            "bert_score": similar[str(key)],
        }
        for key, each in texts.items()
    }


def _over_seeds(seeds: dict[int, dict[str, Statistic]], metric: str, bootstrap: Bootstrap) -> Estimate | None:
    """The mean over the seeds with its t interval; of a single seed the interval over patients."""
    estimates = [bootstrap.estimate(measured[metric]) for measured in seeds.values()]
    known = [estimate for estimate in estimates if estimate]
    return across([estimate.value for estimate in known]) if len(known) > 1 else known[0] if known else None


def _difference(
    ours: dict[int, dict[str, Statistic]], theirs: dict[int, dict[str, Statistic]], metric: str, bootstrap: Bootstrap
) -> Estimate | None:
    """ours − baseline on the same patients, over the seeds that both have."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds or ours is theirs:
        return None
    mine, other = (pooled([side[seed][metric] for seed in seeds]) for side in (ours, theirs))
    return bootstrap.difference(mine, other)


def _write_table(uri: str, cells: Sequence[Cell]) -> None:
    rows = [
        {"variant": cell.variant, "fraction": cell.fraction, "seeds": len(cell.seeds), "metric": metric, "what": what}
        | (estimate.model_dump() if estimate else {})
        | {"published": cell.published.get(metric) if what == "value" else None}
        for cell in cells
        for what, metrics in (("value", cell.metrics), ("minus baseline", cell.minus_baseline))
        for metric, estimate in metrics.items()
    ]
    texts = [pa.field(name, pa.string()) for name in ("variant", "metric", "what")]
    numbers = [pa.field(name, pa.float64()) for name in ("fraction", "value", "low", "high", "published")]
    whole = [pa.field(name, pa.int64()) for name in ("seeds", "n")]
    with storage.staged(uri) as path:
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([*texts, *numbers, *whole])), path)


def _follower(step: str, show: Show | None) -> Callable[[dict[str, float]], None]:
    def told(numbers: dict[str, float]) -> None:
        if show:
            show(step, numbers.get("step", 0), numbers["total"], numbers)

    return told


def _teller(step: str, show: Show | None) -> Callable[[int, int, dict[str, float]], None]:
    def told(done: int, total: int, metrics: dict[str, float]) -> None:
        if show:
            show(step, done, total, metrics)

    return told

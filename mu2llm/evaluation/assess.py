"""Saved predictions → results: every metric of every run with its interval, audits, groups, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pyarrow as pa

from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.engine.predictions import Prediction, Variant
from mu2llm.errors import UserError
from mu2llm.evaluation import external, floors, foreign, judging, length, splits, text_metrics
from mu2llm.evaluation.audits import COVERED, Audit, audit
from mu2llm.evaluation.bert_score import BertScore
from mu2llm.evaluation.bootstrap import Bootstrap, Statistic, estimates
from mu2llm.evaluation.clinical import RATES, Tally, finding_metrics, tally_findings
from mu2llm.evaluation.floors import CLINICAL, PRIOR, Level
from mu2llm.evaluation.results import JUDGED, TITLES, Difference, Group, Header, Results, RunResult
from mu2llm.evaluation.scoring import Texts, content, embedded, judge_finished, judged
from mu2llm.green import GREEN, Judge, judge_reworded, load_judge, measures, rewording
from mu2llm.records import Case, Estimate, Judgement
from mu2llm.settings.green import JudgeConfig

WITHOUT: tuple[Variant, ...] = ("shuffled", "zeroed", "table")


@dataclass(frozen=True)
class _Run:
    """One run's own reports on whole scans, their judgements, and their metrics before intervals.

    `green` are the same judgements, or those of the rules where the judge measures something else; `external` are the
    cases for which an external metric gave no number.
    """

    texts: Texts
    finished: list[bool]
    judgements: list[Judgement]
    green: list[Judgement]
    statistics: dict[str, Statistic]
    external: dict[str, list[str]] = field(default_factory=dict)

    @property
    def scores(self) -> list[float | None]:
        """GREEN of each case."""
        return [judgement.score for judgement in self.green]

    @property
    def by_length(self) -> Statistic:
        return length.correlation(self.scores, self.texts.candidates)


def assess(
    header: Header, cases: Sequence[Case], predictions: Sequence[Prediction], experiment: Experiment
) -> tuple[Results, pa.Table]:
    """The results, and the table of judgements (run, case_id and the columns of Judgement)."""
    judge, rules = judging.load_judge(experiment.judge), load_judge(JudgeConfig())
    if measures(judge) in TITLES.keys() - JUDGED:
        raise UserError(f"judge {judge.identity} measures {measures(judge)}, which is the name of another metric")
    name = experiment.evaluation.text_encoder
    encoder = None if name == "none" else BertScore(name, experiment.evaluation)
    known = {case.id: case for case in cases}
    bootstrap = Bootstrap([case.patient for case in cases], experiment.evaluation.bootstrap, header.seed)
    some = _drawn(cases, experiment.evaluation.paraphrases, header.seed)
    judge = judging.Ahead(judge, [*_pairs(header, predictions, known), *rewording([case.report for case in some])])
    runs: dict[str, _Run] = {}
    for run in header.checkpoints:
        own = _of(predictions, run)
        texts, finished = _texts(own, known), [p.finished for p in own]
        judgements = judge_finished(judge, texts.pairs, finished)
        green = judgements if measures(judge) == GREEN else judge_finished(rules, texts.pairs, finished)
        statistics = {**content(texts), GREEN: judged(green), measures(judge): judged(judgements)}
        runs[run] = _Run(texts, finished, judgements, green, statistics | text_metrics.text_metrics(texts.pairs))
    if encoder:
        for run, statistic in embedded({run: each.texts for run, each in runs.items()}, encoder).items():
            runs[run].statistics["bert_score"] = statistic
    fixed = {floors.NAMES[run]: _texts(own, known) for run in floors.NAMES if (own := _of(predictions, run))}
    beside = header.data if Shards.there(header.data) else ""
    of_green = judge if measures(judge) == GREEN else rules
    bounds = floors.bounds(fixed, of_green, bootstrap, encoder, beside) if fixed else {}
    for name, command in experiment.evaluation.external.items():
        _external(name, command, runs, fixed, bounds, bootstrap)
    metrics = {
        run: {**estimates(each.statistics, bootstrap), "green_length_correlation": bootstrap.estimate(each.by_length)}
        for run, each in runs.items()
    }
    levels = {run: floors.levels(each, bounds) for run, each in metrics.items()}
    paraphrase = _paraphrase(some, judge, header.seed)
    results = Results(
        header=header,
        cases=len(cases),
        split=splits.named(cases, header.split),
        split_hash=splits.split_hash(cases),
        judge=judge.identity,
        measures=measures(judge),
        external=list(experiment.evaluation.external),
        truth=_truth(cases),
        notes={
            "bleu": f"sacrebleu {text_metrics.bleu_signature()}",
            "rouge": "rouge_score, F-measure, stemmed",
            "meteor": f"nltk, {text_metrics.meteor_variant()}",
            "bert_score": encoder.description if encoder else "not measured",
            "prior": header.prior,
            **({} if of_green is judge else {GREEN: f"by {rules.identity}, for the judge measures {measures(judge)}"}),
            **{name: f"by {command}" for name, command in experiment.evaluation.external.items()},
            "intervals": f"95 % percentile bootstrap over patients, {bootstrap.resamples} resamples",
        },
        floors=bounds,
        paraphrase=paraphrase,
        runs={
            run: RunResult(
                metrics=metrics[run],
                levels=levels[run],
                audit=_audit(run, header, runs, levels[run], predictions, known, rules, bootstrap),
                findings=_groups(tally_findings(each.texts.truth, each.texts.found), bootstrap),
                labels=_groups(each.texts.labels, bootstrap),
                regions=_regions(predictions, run, known, rules, bootstrap),
                green=each.scores,
            )
            for run, each in runs.items()
        },
        differences=[
            _difference(ours, theirs, runs, bootstrap) for theirs, ours in combinations(header.checkpoints, 2)
        ],
    )
    return results, _judgements(runs)


def _of(predictions: Sequence[Prediction], run: str, variant: Variant = "as_is") -> list[Prediction]:
    """The reports of a run on whole scans."""
    return [p for p in predictions if (p.run, p.variant, p.region) == (run, variant, None)]


def _texts(predictions: Sequence[Prediction], known: Mapping[str, Case]) -> Texts:
    cases = tuple(known[p.case_id] for p in predictions)
    return Texts(cases, tuple(case.report for case in cases), tuple(p.text for p in predictions))


def _audit(
    run: str,
    header: Header,
    runs: Mapping[str, _Run],
    levels: Mapping[str, Level],
    predictions: Sequence[Prediction],
    known: Mapping[str, Case],
    rules: Judge,
    bootstrap: Bootstrap,
) -> Audit:
    """With the contrasts of what was written without the case's own scan, where there is such."""
    own = runs[run]
    without = {str(variant): _of(predictions, run, variant) for variant in WITHOUT}
    without["prior"] = _of(predictions, PRIOR)
    variants = {variant: _texts(each, known) for variant, each in without.items() if each}
    clinical, below = floors.describe(levels, TITLES, CLINICAL), floors.describe(levels, TITLES)
    return audit(
        own.texts,
        variants,
        own.judgements,
        own.finished,
        rules,
        shortfalls=[line for line in (clinical, _missing(header, len(known)), *_unmeasured(own)) if line],
        warnings=[
            *([below] if below not in ("", clinical) else []),
            *foreign.describe(header.unmatched),
            *external.describe(own.external, len(own.texts)),
        ],
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
    )


def _external(
    name: str,
    command: str,
    runs: Mapping[str, _Run],
    fixed: Mapping[str, Texts],
    bounds: dict[str, dict[str, Estimate | None]],
    bootstrap: Bootstrap,
) -> None:
    """Puts an external metric among those of runs, floors and ceiling."""
    some = next(iter(fixed.values()), None)
    ceiling = {floors.CEILING: Texts(some.cases, some.references, some.references)} if some else {}
    beside = {f"{floor} (floor)": texts for floor, texts in {**fixed, **ceiling}.items()}  # a run may be called so too
    found = external.measured(name, command, {**{run: each.texts for run, each in runs.items()}, **beside})
    for run, each in runs.items():
        if name in each.statistics:
            raise UserError(f"external metric {name}: that is the name of another metric; give another")
        each.statistics[name], each.external[name] = found.statistics[run], found.missing[run]
    for floor in (*fixed, *ceiling):
        bounds[floor][name] = bootstrap.estimate(found.statistics[f"{floor} (floor)"])


def _unmeasured(run: _Run) -> list[str]:
    """What is said where an external metric has no number for too many cases."""
    short = {name: ids for name, ids in run.external.items() if len(ids) > (1 - COVERED) * len(run.texts)}
    return external.describe(short, len(run.texts))


def _missing(header: Header, cases: int) -> str:
    """What is said where too many references have no prediction."""
    expected = cases + len(header.unmatched.get("missing", ()))
    few = cases < COVERED * expected
    return f"scored on {cases} of {expected} cases only: the others have no prediction" if few else ""


def _pairs(header: Header, predictions: Sequence[Prediction], known: Mapping[str, Case]) -> list[tuple[str, str]]:
    """Every report of the runs that is to be judged, with its reference."""
    own = [p for run in header.checkpoints for p in _of(predictions, run) if p.finished]
    return [(known[p.case_id].report, p.text) for p in own]


def _drawn(cases: Sequence[Case], most: int, seed: int) -> list[Case]:
    """Some cases, whose references the judge gets in other words."""
    return [cases[i] for i in sorted(np.random.default_rng(seed).permutation(len(cases))[:most])]


def _paraphrase(some: Sequence[Case], judge: Judge, seed: int) -> Estimate | None:
    """What the judge gives references in other words; None where it is not asked."""
    statistic = judged(judge_reworded(judge, [case.report for case in some]))
    return Bootstrap([case.patient for case in some], seed=seed).estimate(statistic)


def _truth(cases: Sequence[Case]) -> str:
    known = sum(case.findings is not None for case in cases)
    if known == len(cases):
        return "the cases' own findings"
    read = "findings that the rules read in the reference reports"
    return read if not known else f"the own findings of {known} cases, of the others {read}"


def _groups(tally: Tally, bootstrap: Bootstrap) -> list[Group]:
    """Precision, recall and F1 of each finding or label."""
    rates = {rate: tally.by_name(rate) for rate in RATES}
    positives = (tally.counts[..., 0] + tally.counts[..., 2] > 0).sum(axis=0)
    return [
        Group(name=name, n=int(n), metrics={rate: bootstrap.estimate(by_name[name]) for rate, by_name in rates.items()})
        for name, n in zip(tally.names, positives, strict=True)
    ]


def _regions(
    predictions: Sequence[Prediction], run: str, known: Mapping[str, Case], rules: Judge, bootstrap: Bootstrap
) -> list[Group]:
    """Answers to the cases' questions about one region, against those answers; GREEN by rules."""
    groups = []
    asked = [p for p in predictions if p.run == run and p.region]
    for region in dict.fromkeys(p.region for p in asked):
        own = [p for p in asked if p.region == region]
        texts = _answers(own, known)
        draw = Bootstrap([case.patient for case in texts.cases], bootstrap.resamples, bootstrap.seed)
        scores = text_metrics.text_metrics(texts.pairs)
        statistics = {
            "finding_f1": finding_metrics(texts.truth, texts.found)["finding_f1"],
            "green_rules": judged(rules.judge(texts.pairs)),
            "bleu_1": scores["bleu_1"],
            "rouge_l": scores["rouge_l"],
        }
        groups.append(Group(name=str(region), n=len(own), metrics=estimates(statistics, draw)))
    return groups


def _answers(predictions: Sequence[Prediction], known: Mapping[str, Case]) -> Texts:
    """The case's own truth is of the whole scan; of a region it is what its answer says."""
    cases = tuple(known[p.case_id].model_copy(update={"findings": None, "labels": None}) for p in predictions)
    references = tuple(
        next(asked.answer for asked in case.questions if (asked.question, asked.region) == (p.question, p.region))
        for case, p in zip(cases, predictions, strict=True)
    )
    return Texts(cases, references, tuple(p.text for p in predictions))


def _difference(ours: str, theirs: str, runs: Mapping[str, _Run], bootstrap: Bootstrap) -> Difference:
    mine, other = runs[ours].statistics, runs[theirs].statistics
    metrics = {name: bootstrap.difference(statistic, other[name]) for name, statistic in mine.items()}
    us, them = ((runs[run].scores, runs[run].texts.candidates) for run in (ours, theirs))
    metrics["green_matched_length"] = bootstrap.estimate(length.at_matched_length(us, them))
    return Difference(ours=ours, theirs=theirs, metrics=metrics)


def _judgements(runs: Mapping[str, _Run]) -> pa.Table:
    """All judgements with their run and case."""
    table = Judgement.table([judgement for run in runs.values() for judgement in run.judgements])
    cases = [case.id for run in runs.values() for case in run.texts.cases]
    names = [name for name, run in runs.items() for _ in run.texts.cases]
    return table.add_column(0, "case_id", pa.array(cases, pa.string())).add_column(
        0, "run", pa.array(names, pa.string())
    )

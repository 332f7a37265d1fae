"""Floors and ceilings: what needs no model scores on the same cases, so that no table flatters.

Floors: one typical training report for every patient, another patient's report, all labels and findings, none.
Between them and the ceiling lies what a perfect classifier with a table of reports gets: the training report whose
labels are nearest to the true ones. The ceiling is the reference against itself, where the labels that the rules read
in it are compared with the true ones too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, TypeAdapter

from mu2llm import artefacts, green, storage
from mu2llm.evaluation import clinical
from mu2llm.evaluation.bootstrap import Bootstrap, Statistic, estimates
from mu2llm.evaluation.scoring import Texts, content, embedded, judged
from mu2llm.evaluation.text_metrics import stemmed, text_metrics
from mu2llm.green import Judge
from mu2llm.records import Case, Estimate, Finding

if TYPE_CHECKING:
    from mu2llm.evaluation.bert_score import BertScore

PRIOR, OTHER, NEAREST = "prior", "other_patient", "nearest"
"""Runs among the saved predictions that no model wrote."""
NAMES = {PRIOR: "constant", OTHER: "other_patient", NEAREST: "nearest"}
"""Such a run → its name among the floors."""
FLOORS = ("constant", "other_patient", "all_positive", "all_negative")
CEILING = "reference"
TITLES = {
    "constant": "one typical training report for all",
    "other_patient": "another patient's report",
    "all_positive": "every finding and label",
    "all_negative": "no finding and no label",
    "nearest": "training report of the nearest true labels",
    "reference": "the reference itself",
}
"""What people read, in the order of tables."""
CLINICAL = ("finding_f1", "green", "ce_macro_f1")
"""Who is not above the floor in one of these is not promoted."""
_TRADED = ("precision", "recall", "laterality")  # what naming everything, or nothing, has for nothing
SAMPLE = 800
"""Training reports among which the typical and the nearest ones are sought."""
VERSION = 1
"""Of how floors are made: others are measured anew."""
_KEPT = TypeAdapter(dict[str, dict[str, Estimate | None]])


class Level(BaseModel):
    """Where a metric stands between the best of the floors (`of` names it) and the ceiling."""

    value: float
    low: float
    floor: float
    of: str
    ceiling: float

    @property
    def below(self) -> bool:
        """Not above its floor."""
        return self.value <= self.floor + 1e-9

    @property
    def share(self) -> float:
        """Of the way from floor to ceiling: 0 is the floor, 1 the ceiling, below 0 is worse than no model."""
        return (self.value - self.floor) / (self.ceiling - self.floor)

    @property
    def description(self) -> str:
        """The share as tables have it: ↑ 37 %."""
        return f"{'↓' if self.share < 0 else '↑'} {100 * abs(self.share):.0f} %"


Metrics = Mapping[str, Estimate | None]


def levels(metrics: Metrics, floors: Mapping[str, Metrics]) -> dict[str, Level]:
    """Metric → level, of those that have a floor and a ceiling above it."""
    found = {}
    for name, estimate in metrics.items():
        ceiling = floors.get(CEILING, {}).get(name)
        known = {floor: each for floor in FLOORS if (each := floors.get(floor, {}).get(name))}
        if estimate is None or ceiling is None or not known or name.endswith(_TRADED):
            continue
        of = max(known, key=lambda floor: known[floor].value)
        floor = known[of].value
        if ceiling.value > floor + 1e-9:
            found[name] = Level(value=estimate.value, low=estimate.low, floor=floor, of=of, ceiling=ceiling.value)
    return found


def describe(levels: Mapping[str, Level], titles: Mapping[str, str], names: Sequence[str] | None = None) -> str:
    """What is not above its floor, in words; "" where all is. `names`: of these alone."""
    below = {name: level for name, level in levels.items() if level.below}
    if below and len(below) == len(levels):
        return "this is the floor: no metric is above what needs no model"
    below = {name: level for name, level in below.items() if names is None or name in names}
    if not below:
        return ""
    said = [f"{titles.get(name, name)} {each.value:.3f} ({each.of} {each.floor:.3f})" for name, each in below.items()]
    return f"below its floor: {', '.join(said)}"


# ---- what they score


def bounds(
    texts: Mapping[str, Texts], judge: Judge, bootstrap: Bootstrap, encoder: BertScore | None, beside: str = ""
) -> dict[str, dict[str, Estimate | None]]:
    """Floor or ceiling → metric → estimate. `texts` are of what was `written`, by floor.

    GREEN where `judge` is the rules judge, for a language model would have to judge every case four times more.
    `beside` is the URI of shards beside which the numbers are kept; "" keeps none.
    """
    some = next(iter(texts.values()))
    every = {**texts, CEILING: Texts(some.cases, some.references, some.references)}
    of = {
        "texts": {name: each.candidates for name, each in every.items()},
        "truth": [case.model_dump(mode="json", include={"patient", "findings", "labels"}) for case in some.cases],
        "by": [VERSION, green.rules_identity(), judge.identity, encoder.identity if encoder else None],
        "bootstrap": [bootstrap.resamples, bootstrap.seed],
    }
    place = storage.join(beside, "floors", f"{artefacts.digest(of)}.json") if beside else ""
    if place and storage.exists(place):
        return _KEPT.validate_python(storage.read_json(place))
    rules = judge.identity == green.rules_identity()
    statistics = {name: _statistics(each, judge if rules else None) for name, each in every.items()}
    if encoder:
        for name, statistic in embedded(every, encoder).items():
            statistics[name]["bert_score"] = statistic
    found = {name: estimates(each, bootstrap) for name, each in {**statistics, **of_labels(some)}.items()}
    if place:
        storage.write_json(place, _KEPT.dump_python(found, mode="json"))
    return found


def _statistics(texts: Texts, judge: Judge | None) -> dict[str, Statistic]:
    by_judge = {"green": judged(judge.judge(texts.pairs))} if judge else {}
    return {**content(texts), **by_judge, **text_metrics(texts.pairs)}


# ---- what is written without a model


def written(cases: Sequence[Case], train: Sequence[Case], seed: int = 0) -> dict[str, list[str]]:
    """Run → its report for every case. Without training cases the cases themselves stand for them, each patient's
    own left out."""
    pool = _drawn(train or cases, seed)
    typical = typicality([case.report for case in pool])
    return {
        PRIOR: [pool[int(typical.argmax())].report] * len(cases),
        OTHER: _others(cases, seed),
        NEAREST: _nearest(cases, pool, typical),
    }


def table(cases: Sequence[Case], train: Sequence[Case], reports: Sequence[str], seed: int = 0) -> list[str]:
    """The table writer: for every report of a model the training report whose labels and findings are nearest to those
    that it names. What a model's language adds to its own classification is what its reports score above these."""
    pool = _drawn(train or cases, seed)
    named = [
        case.model_copy(update={"report": text, "labels": None, "findings": _findings(case, text)})
        for case, text in zip(cases, reports, strict=True)
    ]
    return _nearest(named, pool, typicality([case.report for case in pool]))


def _findings(case: Case, text: str) -> tuple[Finding, ...] | None:
    return None if case.findings is None else tuple(green.findings(text))


def prior_source(train: Sequence[Case]) -> str:
    """Whence the constant and the nearest report are."""
    return f"one of {len(train)} training reports" if train else "one of the split's own reports: there is no train"


def _drawn(cases: Sequence[Case], seed: int) -> list[Case]:
    chosen = np.random.default_rng(seed).permutation(len(cases))[:SAMPLE]
    return [cases[i] for i in sorted(chosen)]


def typicality(reports: Sequence[str]) -> np.ndarray:
    """The mean ROUGE-1 F of each report as the answer to all of them (n,): the medoid has the highest."""
    words = [stemmed(report) for report in reports]
    column: dict[tuple[str, int], int] = {}
    places = []
    for each in words:  # a word's second occurrence is a column of its own, so a product counts clipped matches
        times: Counter[str] = Counter()
        row = []
        for word in each:
            row.append(column.setdefault((word, times[word]), len(column)))
            times[word] += 1
        places.append(row)
    table = np.zeros((len(reports), max(1, len(column))), np.float32)
    for i, row in enumerate(places):
        table[i, row] = 1
    lengths = np.array([len(each) for each in words], dtype=float)
    both = np.maximum(lengths[:, None] + lengths[None, :], 1)
    return np.asarray((2 * (table @ table.T) / both).mean(axis=1))


def _others(cases: Sequence[Case], seed: int) -> list[str]:
    """Each case's report exchanged for one of another patient; its own where there is no other."""
    order = np.random.default_rng(seed).permutation(len(cases)).tolist()
    found = [case.report for case in cases]
    for place, i in enumerate(order):
        later = (order[(place + step) % len(order)] for step in range(1, len(order)))
        other = next((j for j in later if cases[j].patient != cases[i].patient), i)
        found[i] = cases[other].report
    return found


def _nearest(cases: Sequence[Case], pool: Sequence[Case], typical: np.ndarray) -> list[str]:
    """The pool's report that differs in the fewest labels and known findings; of several the most typical."""
    ours, theirs = _present(cases), _present(pool)
    column = {key: i for i, key in enumerate(sorted(set().union(*ours, *theirs), key=str))}
    tables = [np.zeros((len(rows), len(column)), np.float32) for rows in (ours, theirs)]
    for table, rows in zip(tables, (ours, theirs), strict=True):
        for i, keys in enumerate(rows):
            table[i, [column[key] for key in keys]] = 1
    mine, other = tables
    apart = mine.sum(axis=1)[:, None] + other.sum(axis=1)[None, :] - 2 * mine @ other.T
    apart = apart - typical[None, :] / 2  # below 1, so that it only orders equals
    same = np.array([[case.patient == each.patient for each in pool] for case in cases])
    apart[same & ~same.all(axis=1, keepdims=True)] = np.inf
    return [pool[int(row.argmin())].report for row in apart]


def _present(cases: Sequence[Case]) -> list[set[tuple[str, str | None]]]:
    found = []
    for case in cases:
        labels = case.labels if case.labels is not None else green.labels(case.report)
        keys: set[tuple[str, str | None]] = {(name, None) for name, value in labels.items() if value}
        found.append(keys | {(finding.name, finding.side or "") for finding in case.findings or ()})
    return found


# ---- what says everything, and nothing


def of_labels(texts: Texts) -> dict[str, dict[str, Statistic]]:
    """all_positive and all_negative: metrics of findings and labels for whoever names every one, or none."""
    every = [Finding(name=name, side="bilateral") for name in sorted({f.name for t in texts.truth for f in t})]
    found = {}
    for name, findings, value in (("all_positive", every, 1), ("all_negative", [], 0)):
        said = [dict.fromkeys(green.LABELS, value)] * len(texts)
        found[name] = {
            **clinical.finding_metrics(texts.truth, [findings] * len(texts)),
            **clinical.label_metrics(clinical.tally_labels(texts.true_labels, said, green.LABELS)),
        }
    return found

"""Preference data: candidates of a checkpoint → judgements → pairs of a better and a worse report.

Everything is kept under `out`: `candidates`, `judgements` and `pairs` as Parquet, written part by part, as they may not
fit into memory, and `preferences.json`, which names the shards, spec and split they came from and is written last.
Sampling resumes by cases, and what a language model has judged is not asked again. Radiologists' corrections are pairs
too, without a judge; scans of theirs that the shards do not have lie in `corrected`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import Any, ClassVar, Self

import pyarrow as pa
from pydantic import BaseModel

from mu2llm import artefacts, green, storage
from mu2llm.artefacts import Identity, open_checkpoint
from mu2llm.cases import Shards
from mu2llm.cases.shards import Joined
from mu2llm.config import Experiment
from mu2llm.engine.features import cached_features
from mu2llm.engine.generate import checked, parts
from mu2llm.engine.predictions import Request
from mu2llm.engine.sampling import Decoding
from mu2llm.errors import Failure, UserError
from mu2llm.evaluation import judging
from mu2llm.green import Judge
from mu2llm.progress import Counted
from mu2llm.records import Candidate, Case, Judgement, PreferencePair
from mu2llm.settings.reward import reward_terms
from mu2llm.settings.stages import PreferencesConfig
from mu2llm.stages.corrections import correct, digest, find_inputs, read_corrections
from mu2llm.stages.corruption import corrupt
from mu2llm.stages.pairs import make_pairs, screen
from mu2llm.stages.rewards import Judged, rewarded

SAMPLING = "sampling"
CORRECTED = "corrected"
AT_ONCE = 24_000
"""Candidates in memory, with their judgements, of some 13 KB each; CT-RATE has 377,000."""
MADE = ("pairs.parquet", "candidates.parquet", "judgements.parquet", "reference", SAMPLING, CORRECTED)
"""What lies beside the description: not the cache of judgements, which names what it holds by content."""


class Preferences(BaseModel):
    """What `prefer` wrote, and all that `dpo` needs to know. `dropped` counts candidates and pairs by reason;
    `corrected` is the URI of scans that pairs are about and the shards do not have, empty where there are none."""

    FILE: ClassVar[str] = "preferences.json"

    shards: str
    corrected: str = ""
    data_checksum: str
    spec_hash: str
    split: str
    checkpoint: str
    judge: str
    identity: str
    inputs: dict[str, Any] = {}
    cases: int
    candidates: int
    pairs: int
    cases_with_pairs: int
    dropped: dict[str, int]
    green_best: float | None
    green_worst: float | None

    @classmethod
    def open(cls, uri: str) -> Self:
        """A UserError where there are none."""
        path = storage.join(uri, cls.FILE)
        if not storage.exists(path):
            raise UserError(f"{uri} holds no preference pairs: it has no {cls.FILE}; give what `mu2llm prefer` wrote")
        return cls.model_validate(storage.read_json(path))

    def scans(self) -> Shards:
        """All that pairs may be about: the shards, and the corrected scans behind them."""
        shards = Shards.open(self.shards)
        return Joined(shards, Shards.open(self.corrected)) if self.corrected else shards


def prefer(
    checkpoint: str,
    data: str,
    out: str,
    experiment: Experiment,
    judge: Judge | None = None,
    progress: Counted | None = None,
    corrections: str | None = None,
    fresh: bool = False,
) -> Preferences:
    """Samples, judges and pairs; `corrections` (a URI of JSON lines) of the split's scans, and of those whose input was
    kept beside them, are added as they are.

    Run again it goes on, or gives what is done; `fresh` removes what it wrote at `out` before and starts over. Raises
    UserError where checkpoint and shards do not fit, no correction makes a pair or other pairs lie at `out`; Failure
    without any pair.
    """
    shards = Shards.open(data)
    kept_under = experiment.judge.cache or storage.join(out, "judging")
    judged_by = {"judge": judge.identity} if judge else green.decides(experiment.judge)
    given = read_corrections(corrections) if corrections else []
    inputs = find_inputs(corrections, given) if corrections else {}
    settings = experiment.preferences
    identity = identify(checkpoint, shards, experiment, judged_by, digest(given, inputs) if given else "")
    if not fresh and storage.exists(storage.join(out, Preferences.FILE)):
        there = Preferences.open(out)
        identity.check(out, "preference pairs", there.identity, there.inputs)
        return there
    judge = judge or judging.load_judge(experiment.judge.model_copy(update={"cache": kept_under}))
    human = correct(given, inputs, shards, settings.split)
    if given and not human.pairs:
        raise UserError(f"{corrections}: none of {len(given)} corrections makes a pair: {_listed(human.unused)}")
    request = _request(checkpoint, shards, experiment)
    checked(request)
    if fresh:
        for name in (Preferences.FILE, *MADE):
            storage.delete(storage.join(out, name))
    artefacts.claim(storage.join(out, SAMPLING), request.identity, "candidates")
    cases = {case.id: case for case in request.cases(shards)}
    counts = _Counts(dropped=human.unused)
    with tables(out) as write:
        for sampled in _sampled(request, out, progress):
            judged = _judged(judge, _candidates(sampled, cases, experiment, counts), cases, settings)
            write(judged, _paired(judged, experiment, counts))
        write([], human.pairs)
        counts.paired(human.pairs)
    result = Preferences(
        shards=storage.lasting(data),
        corrected=human.write(storage.join(out, CORRECTED), settings.split, shards.spec),
        data_checksum=shards.checksum,
        spec_hash=shards.spec.hash,
        split=settings.split,
        checkpoint=storage.lasting(checkpoint),
        judge=judge.identity,
        identity=identity.digest,
        inputs=identity.inputs,
        cases=len(cases),
        **counts.summary(),
    )
    if not result.pairs:
        raise Failure(f"{len(cases)} cases gave no pair ({result.dropped}); lower preferences.margin or add candidates")
    storage.write_json(storage.join(out, Preferences.FILE), result.model_dump(mode="json"))
    return result


@dataclass
class _Counts:
    """Of candidates and pairs, as they come."""

    candidates: int = 0
    pairs: int = 0
    with_pairs: set[str] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    best: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)

    def judged(self, of_case: Sequence[Judged]) -> None:
        self.candidates += len(of_case)
        scores = [item.judgement.score for item in of_case if item.judgement.score is not None]
        if scores:
            self.best.append(max(scores))
            self.worst.append(min(scores))

    def paired(self, pairs: Sequence[PreferencePair]) -> None:
        self.pairs += len(pairs)
        self.with_pairs |= {pair.case_id for pair in pairs}

    def summary(self) -> dict[str, Any]:
        """As `Preferences` has them."""
        return {
            "candidates": self.candidates,
            "pairs": self.pairs,
            "cases_with_pairs": len(self.with_pairs),
            "dropped": {reason: n for reason, n in sorted(self.dropped.items()) if n},
            "green_best": fmean(self.best) if self.best else None,
            "green_worst": fmean(self.worst) if self.worst else None,
        }


def identify(
    checkpoint: str,
    shards: Shards,
    experiment: Experiment,
    judge: Mapping[str, Any] | None = None,
    corrections: str = "",
) -> Identity:
    """What decides the pairs; `judge` is what decides the verdicts on candidates, if not the experiment's;
    `corrections` the digest of those that are given."""
    fraction = experiment.data.fraction
    inputs = {
        **artefacts.decides("preferences", experiment.preferences, leave_out=("precision",)),
        **experiment.preferences.rounding,
        **(judge or green.decides(experiment.judge)),
        **({} if experiment.preferences.reward == "green" else {"rules": green.rules_identity()}),
        "seed": experiment.seed,
        "evaluation.question": experiment.evaluation.question,
        **({} if fraction == 1 else {"data.fraction": fraction}),
        **({"corrections": corrections} if corrections else {}),
        "data": shards.checksum,
        "checkpoint": artefacts.weights_of(open_checkpoint(checkpoint)).weights,
    }
    return Identity.of(inputs)


def content(pairs: Sequence[PreferencePair], shards: Shards) -> str:
    """Digest of pairs and of the scans that they are about: what of them decides a training. A corrected scan's case is
    named by its content."""
    return artefacts.digest([shards.checksum, *(pair.key for pair in pairs)])


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in reasons.items())


def read_pairs(uri: str) -> list[PreferencePair]:
    """The pairs at a URI that `prefer` wrote, in order."""
    table = storage.read_table(storage.join(uri, "pairs.parquet"))
    return [PreferencePair.from_row(row) for row in table.to_pylist()]


def _request(checkpoint: str, shards: Shards, experiment: Experiment) -> Request:
    """`candidates` texts a case; where no stage has cached a scan's features, who writes of it encodes it, once."""
    settings, share = experiment.preferences, experiment.data.fraction
    few = share < 1 and settings.split == "train"
    return Request(
        checkpoints={"policy": checkpoint},
        data=cached_features([checkpoint], shards, settings.used_precision) or shards.uri,
        split=settings.split,
        question=experiment.evaluation.question,
        decoding=Decoding(
            max_new_tokens=settings.max_new_tokens,
            samples=settings.candidates,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=experiment.seed,
        ),
        max_cases=settings.max_cases,
        ids=tuple(shards.subset("train", share, experiment.seed)) if few else None,
        inference=settings,
    )


def _sampled(request: Request, out: str, progress: Counted | None) -> Iterator[list[Candidate]]:
    """The candidates of some cases at a time; what is finished is kept below `out` and not done again."""
    seed, cases = request.decoding.seed, max(1, AT_ONCE // request.decoding.samples)
    for part in parts(request, storage.join(out, SAMPLING), cases, progress):
        yield [Candidate(case_id=p.case_id, index=p.index, text=p.text, origin="sampled", seed=seed) for p in part]


def _candidates(
    sampled: list[Candidate], cases: dict[str, Case], experiment: Experiment, counts: _Counts
) -> list[Candidate]:
    """Those of some cases that can be judged, in the order of cases and indexes, with what the settings add to them."""
    settings = experiment.preferences
    these = [cases[name] for name in dict.fromkeys(candidate.case_id for candidate in sampled)]
    added: list[Candidate] = []
    if settings.negatives == "corrupted":
        added += _corrupted(sampled, these, list(cases.values()), experiment.seed)
    if settings.chosen == "reference":
        added += _references([*sampled, *added], these, experiment.seed)
    kept, dropped = _screened([*sampled, *added], settings.min_words)
    counts.dropped += dropped
    return kept


def _judged(
    judge: Judge, candidates: list[Candidate], cases: dict[str, Case], settings: PreferencesConfig
) -> list[Judged]:
    judgements = judge.judge([(cases[candidate.case_id].report, candidate.text) for candidate in candidates])
    terms, judged = reward_terms(settings.reward), zip(candidates, judgements, strict=True)
    by_case = groupby(judged, key=lambda item: item[0].case_id)
    return [each for name, group in by_case for each in rewarded(terms, cases[name].report, list(group))]


def _paired(judged: list[Judged], experiment: Experiment, counts: _Counts) -> list[PreferencePair]:
    pairs: list[PreferencePair] = []
    for _, group in groupby(judged, key=lambda item: item.candidate.case_id):
        of_case = list(group)
        made, why = make_pairs(experiment.evaluation.question, of_case, experiment.preferences)
        counts.judged(of_case)
        counts.paired(made)
        counts.dropped += why
        pairs += made
    return pairs


def _corrupted(sampled: list[Candidate], cases: list[Case], everyone: list[Case], seed: int) -> list[Candidate]:
    """References with known errors, and the references themselves, as further candidates of each case."""
    most = _next_index(sampled)
    reports = [case.report for case in everyone]
    made = []
    for case in cases:
        made.append(Candidate(case_id=case.id, index=most, text=case.report, origin="corrupted", seed=seed))
        made += corrupt(case, reports, most + 1, seed)
    return made


def _references(sampled: list[Candidate], cases: list[Case], seed: int) -> list[Candidate]:
    """Each case's own report as one more candidate: the best of them by any judge."""
    index = _next_index(sampled)
    return [Candidate(case_id=case.id, index=index, text=case.report, origin="reference", seed=seed) for case in cases]


def _next_index(sampled: list[Candidate]) -> int:
    return 1 + max((candidate.index for candidate in sampled), default=-1)


def _screened(candidates: list[Candidate], min_words: int) -> tuple[list[Candidate], Counter[str]]:
    """What `screen` keeps of each case, in the order of cases and indexes."""
    ordered = sorted(candidates, key=lambda candidate: (candidate.case_id, candidate.index))
    kept: list[Candidate] = []
    dropped: Counter[str] = Counter()
    for _, group in groupby(ordered, key=lambda candidate: candidate.case_id):
        some, why = screen(list(group), min_words)
        kept += some
        dropped += why
    return kept, dropped


_OF = pa.schema([Candidate.arrow_schema.field(name) for name in ("case_id", "index")])
_JUDGEMENTS = pa.schema([*_OF, *Judgement.arrow_schema, pa.field("reward", pa.float64())])


@contextlib.contextmanager
def tables(out: str) -> Iterator[Callable[[Sequence[Judged], Sequence[PreferencePair]], None]]:
    """Takes judged candidates and pairs, part by part: the candidates to one table, their judgements and rewards to
    another, the pairs to a third."""
    with contextlib.ExitStack() as stack:
        schemas = {
            "candidates": Candidate.arrow_schema,
            "judgements": _JUDGEMENTS,
            "pairs": PreferencePair.arrow_schema,
        }
        writers = {
            name: stack.enter_context(storage.table_writer(storage.join(out, f"{name}.parquet"), schema))
            for name, schema in schemas.items()
        }

        def write(judged: Sequence[Judged], pairs: Sequence[PreferencePair]) -> None:
            of = [{"case_id": each.candidate.case_id, "index": each.candidate.index} for each in judged]
            rows = {
                "candidates": [each.candidate.row() for each in judged],
                "judgements": [
                    {**ids, **each.judgement.row(), "reward": each.reward} for ids, each in zip(of, judged, strict=True)
                ],
                "pairs": [pair.row() for pair in pairs],
            }
            for name, some in rows.items():
                writers[name](pa.Table.from_pylist(some, schema=schemas[name]))

        yield write


def read_judged(uri: str) -> list[Judged]:
    """What `tables` was given, in order; where that was before rewards had names, the reward is GREEN."""
    candidates, rows = (
        storage.read_table(storage.join(uri, f"{name}.parquet")).to_pylist() for name in ("candidates", "judgements")
    )
    return [
        Judged(Candidate.from_row(candidate), Judgement.from_row(row), row.get("reward", row["score"]))
        for candidate, row in zip(candidates, rows, strict=True)
    ]

"""On-policy rounds: the policy's own candidates → judge → pairs → DPO with that policy as reference → held-out score.

Nothing but `prefer` and `dpo` in turn, each round from the checkpoint that the round before it made. Pairs of another
policy's candidates say less and less about the one that is trained. Rounds end early where held-out findings get worse
while GREEN gets better: then it is the judge that is learned, not the scan.

Below `out`: `round-1`, `round-2` … with `preferences`, `checkpoint` and `held-out` reports, and online.json.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar

from pydantic import BaseModel, Field
from rich.markup import escape
from rich.table import Table

from mu2llm import green, storage
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.engine.features import cached_features
from mu2llm.engine.generate import checked, generate
from mu2llm.engine.predictions import Request
from mu2llm.engine.sampling import Decoding
from mu2llm.errors import UserError
from mu2llm.evaluation.leaderboard import cell
from mu2llm.progress import Steps, counted, logged
from mu2llm.records import Estimate
from mu2llm.stages import dpo
from mu2llm.stages.preferences import prefer
from mu2llm.stages.validation import score

logger = logging.getLogger(__name__)
LENGTH_RATIO = 1.5
"""Of a pair's longer report to its shorter, at most, where `preferences.max_length_ratio` says nothing: over rounds a
drift to longer reports adds up."""


class Round(BaseModel):
    """A policy, its pairs (none of the one before the first round), and what its reports on held-out cases are worth.

    `spread` is the mean difference of GREEN between a case's best and worst candidate, `words` the mean length.
    """

    round: int
    checkpoint: str
    pairs: int | None = None
    spread: float | None = None
    finding_f1: Estimate | None
    green: Estimate | None
    words: float


class Online(BaseModel):
    """What the rounds gave: `best` is the checkpoint to go on with, `stopped` why there were fewer than asked."""

    FILE: ClassVar[str] = "online.json"

    judge: str
    reward: str
    max_length_ratio: float = Field(description="of a pair's longer report to its shorter")
    data: str
    split: str = "validation"
    rounds: list[Round]
    best: str
    stopped: str | None = None


def run(
    checkpoint: str, data: str, out: str, experiment: Experiment, rounds: int, show: Steps, fresh: bool = False
) -> Online:
    """`rounds` of candidates, pairs and DPO from `checkpoint`; what is done is not done again.

    Raises UserError where nothing would be judged, there are no held-out cases, or checkpoint and shards do not fit.
    """
    shards = Shards.open(data)
    experiment = _checked(checkpoint, shards, experiment, rounds)
    found = [_score(0, checkpoint, shards, storage.join(out, "round-0"), experiment, show)]
    judge, stopped = "", None
    for number in range(1, rounds + 1):
        place = storage.join(out, f"round-{number}")
        policy, name = found[-1].checkpoint, f"round {number}"
        pairs = storage.join(place, "preferences")
        made = prefer(policy, data, pairs, experiment, progress=counted(show, f"{name}: candidates"), fresh=fresh)
        trained = storage.join(place, "checkpoint")
        dpo.run(pairs, trained, experiment, policy, logged(show, f"{name}: dpo"), fresh=fresh)
        after = _score(number, trained, shards, place, experiment, show)
        judge = made.judge
        spread = None if made.green_best is None or made.green_worst is None else made.green_best - made.green_worst
        found.append(after.model_copy(update={"pairs": made.pairs, "spread": spread}))
        stopped = drifted(found)
        if stopped:
            logger.warning("%s", stopped)
            break
    kept = found[:-1] if stopped else found
    result = Online(
        judge=judge,
        reward=experiment.preferences.reward,
        max_length_ratio=experiment.preferences.max_length_ratio or LENGTH_RATIO,
        data=storage.lasting(data),
        rounds=found,
        best=storage.lasting(max(kept, key=lambda each: each.green.value if each.green else 0.0).checkpoint),
        stopped=stopped,
    )
    storage.write_json(storage.join(out, Online.FILE), result.model_dump(mode="json"))
    return result


def _checked(checkpoint: str, shards: Shards, experiment: Experiment, rounds: int) -> Experiment:
    """The experiment with a cap on lengths; a UserError before anything starts."""
    settings = experiment.preferences
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: give at least 1")
    if settings.max_cases == 0:
        raise UserError("preferences.max_cases=0 samples nothing that could be judged: rounds need candidates")
    if not shards.count("validation"):
        raise UserError(f"{shards.uri} has no rows in split validation, which tells when rounds do harm")
    checked(_request(checkpoint, shards, experiment))
    green.check_judge(experiment.judge)  # before hours of writing
    if settings.max_length_ratio is not None:
        return experiment
    logger.info("preferences.max_length_ratio is not set: pairs of a ratio above %s are dropped", LENGTH_RATIO)
    capped = settings.model_copy(update={"max_length_ratio": LENGTH_RATIO})
    return experiment.model_copy(update={"preferences": capped})


def _request(checkpoint: str, shards: Shards, experiment: Experiment) -> Request:
    """One greedy report of each held-out case."""
    settings = experiment.preferences
    return Request(
        checkpoints={"policy": checkpoint},
        data=cached_features([checkpoint], shards, settings.used_precision) or shards.uri,
        split="validation",
        question=experiment.evaluation.question,
        decoding=Decoding(experiment.evaluation.max_new_tokens),
        inference=settings,
    )


def _score(number: int, checkpoint: str, shards: Shards, place: str, experiment: Experiment, show: Steps) -> Round:
    """A policy on the held-out cases; reports that are there are not written again."""
    progress = counted(show, f"round {number}: held-out")
    written = generate(_request(checkpoint, shards, experiment), storage.join(place, "held-out"), progress)
    texts = [prediction.text for prediction in written]
    estimates = score(shards.cases("validation"), texts, experiment)
    return Round(round=number, checkpoint=checkpoint, words=fmean(len(text.split()) for text in texts), **estimates)


def drifted(rounds: Sequence[Round]) -> str | None:
    """Why to stop after the last of these rounds; None to go on."""
    before, after = rounds[-2:]
    if not (before.finding_f1 and after.finding_f1 and before.green and after.green):
        return None
    worse, better = after.finding_f1.value < before.finding_f1.value, after.green.value > before.green.value
    if not (worse and better):
        return None
    return (
        f"round {after.round}: held-out finding F1 fell from {before.finding_f1.value:.3f} to "
        f"{after.finding_f1.value:.3f} while GREEN rose from {before.green.value:.3f} to {after.green.value:.3f}: "
        f"the checkpoint of round {before.round} is kept"
    )


def table(result: Online) -> Table:
    """The rounds for a terminal, with 95 % intervals over held-out patients."""
    shown = Table(
        *("round", "pairs", "best − worst", "Findings F1", "GREEN", "words", "checkpoint"),
        title=f"held-out cases; judge {result.judge}, reward {escape(result.reward)}, pairs of a length ratio up to "
        f"{result.max_length_ratio:g}",
        caption=result.stopped or f"best: {result.best}",
    )
    for each in result.rounds:
        shown.add_row(
            str(each.round),
            "" if each.pairs is None else str(each.pairs),
            "" if each.spread is None else f"{each.spread:.3f}",
            cell(each.finding_f1),
            cell(each.green),
            f"{each.words:.0f}",
            escape(each.checkpoint),
        )
    return shown

"""JSON lines → what `mu2llm green score`, `mu2llm green parse` and `mu2llm labels` print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from mu2llm.errors import UserError
from mu2llm.green.findings import labels
from mu2llm.green.judge import Judge, Pair
from mu2llm.green.parser import parse
from mu2llm.records import Judgement


def score_lines(lines: Iterable[str], judge: Judge) -> dict[str, Any]:
    """Lines of {reference, candidate} → judgements, their mean over the valid ones, and counts.

    `n_failed` candidates say nothing that can be judged and count as 0; `n_invalid` the judge failed on.
    """
    return _summary([pair for number, row in _rows(lines) for pair in _pairs(row, number)], judge)


def score_pairs(pairs: list[dict[str, Any]], judge: Judge) -> dict[str, Any]:
    """The same for rows that have been read already; a UserError counts them from 1."""
    return _summary([pair for number, row in enumerate(pairs, start=1) for pair in _pairs(row, number)], judge)


def parse_lines(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Lines of {text}, each a judge's answer → valid, score, counts and why of each."""
    return [_public(parse(_text(row, "text", number))) for number, row in _rows(lines)]


def label_lines(lines: Iterable[str]) -> list[dict[str, int]]:
    """Lines of {text}, each a report → its 18 CT-RATE labels."""
    return [labels(_text(row, "text", number)) for number, row in _rows(lines)]


def _summary(pairs: list[Pair], judge: Judge) -> dict[str, Any]:
    judgements = judge.judge(pairs)
    scores = [judgement.score for judgement in judgements if judgement.score is not None]
    return {
        "results": [{**_public(judgement), "judge": judgement.judge} for judgement in judgements],
        "mean": sum(scores) / len(scores) if scores else None,
        "n_valid": len(scores),
        "n_invalid": len(judgements) - len(scores),
        "n_failed": sum(judgement.failed for judgement in judgements),
    }


def _public(judgement: Judgement) -> dict[str, Any]:
    return {
        "score": judgement.score,
        "significant": list(judgement.significant),
        "insignificant": list(judgement.insignificant),
        "matched": judgement.matched,
        "valid": judgement.valid,
        "why": judgement.why,
    }


def _rows(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """JSON lines with their numbers from 1; empty lines and a byte order mark are passed over."""
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix("\ufeff")
        if line.strip():
            try:
                yield number, json.loads(line, strict=False)
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {number} is not JSON: {error}") from None


def _pairs(row: Any, number: int) -> list[Pair]:
    """One line → its pair, or its pairs where both fields are lists of the same length."""
    if isinstance(row, dict) and all(isinstance(row.get(field), list) for field in ("reference", "candidate")):
        references, candidates = row["reference"], row["candidate"]
        if len(references) != len(candidates):
            raise UserError(f"line {number}: {len(references)} reference but {len(candidates)} candidate reports")
        parts = [{"reference": r, "candidate": c} for r, c in zip(references, candidates, strict=True)]
    else:
        parts = [row]
    return [(_text(part, "reference", number), _text(part, "candidate", number)) for part in parts]


def _text(row: Any, field: str, number: int) -> str:
    if not isinstance(row, dict) or field not in row:
        raise UserError(f"line {number}: expected an object with the field {field!r}")
    if not isinstance(row[field], str):
        raise UserError(f"line {number}: {field} must be text, given {type(row[field]).__name__}")
    return str(row[field])

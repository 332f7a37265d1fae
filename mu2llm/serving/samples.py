"""Scans for the reading room that are always there: procedural phantoms, the same on every machine."""

from __future__ import annotations

import functools

from mu2llm.ct import phantom
from mu2llm.serving.problems import Problem
from mu2llm.serving.schemas import Sample

SEED = 2507
COUNT = 6


@functools.lru_cache(maxsize=COUNT)
def make(identity: str) -> phantom.Phantom:
    """A 404 where there is no such sample."""
    numbers = {f"phantom-{n}": n for n in range(COUNT)}
    if identity not in numbers:
        raise Problem(404, "not_found", f"there is no such sample; there are {', '.join(numbers)}")
    return phantom.make(SEED, numbers[identity])


def samples() -> list[Sample]:
    return [_sample(n, make(f"phantom-{n}")) for n in range(COUNT)]


def _sample(number: int, made: phantom.Phantom) -> Sample:
    names = [" ".join(filter(None, (finding.side, finding.name))) for finding in made.findings]
    return Sample(
        id=f"phantom-{number}",
        name=f"Phantom {number + 1}",
        description=f"Procedural phantom, no patient: {', '.join(names) or 'no finding'}.",
        reference=made.report,
    )

"""Audit: do the findings and the impression of one report agree? Counted over the reports that have both."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from mu2llm import green
from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.records import Estimate

EXAMPLES = 5


class Consistency(BaseModel):
    """Shares of the reports that have both parts: whose impression asserts what the findings do not (`unsupported`),
    whose impression leaves out what they assert (`omitted`), one of whose parts denies what the other asserts, or gives
    it another side or size (`contradicted`); `examples` are some of these. `whole` have one part only.
    """

    unsupported: Estimate | None
    omitted: Estimate | None
    contradicted: Estimate | None
    whole: int
    examples: list[str] = []


def consistency(ids: Sequence[str], reports: Sequence[str], bootstrap: Bootstrap) -> Consistency:
    """Of reports (n) and the ids of their cases (n); `bootstrap` draws the same cases."""
    found = [green.agreement(report) for report in reports]
    shares = {
        kind: bootstrap.mean([None if each is None else float(bool(getattr(each, kind))) for each in found])
        for kind in ("unsupported", "omitted", "contradicted")
    }
    wrong = [(name, each) for name, each in zip(ids, found, strict=True) if each and each.contradicted]
    return Consistency(
        **shares,
        whole=sum(each is None for each in found),
        examples=[f"{name}: {'; '.join(each.contradicted)}" for name, each in wrong[:EXAMPLES]],
    )


def describe(own: Consistency, references: Consistency) -> list[str]:
    """What there is to warn of: a model that contradicts itself more often than those who wrote the references."""
    ours, theirs = own.contradicted, references.contradicted
    if ours is None or ours.low <= (theirs.high if theirs else 0):
        return []
    beside = f" (references: {theirs.value:.1%})" if theirs else ""
    return [
        f"findings and impression contradict each other in {ours.value:.1%} of {ours.n} reports{beside}, "
        f"such as {own.examples[0]}"
    ]

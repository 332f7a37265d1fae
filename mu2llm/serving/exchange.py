"""What passes between the ingress and the generators."""

from __future__ import annotations

from dataclasses import dataclass, field

from mu2llm.records import PreprocessSpec
from mu2llm.serving.decoder import Scan


@dataclass(frozen=True)
class ReportRequest:
    """A report to write: of which scan, on what question (None: the model's own), and how.

    `id` makes sampling repeatable and is otherwise only for following a request.
    """

    id: str
    scan: Scan
    question: str | None = None
    region: str | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class InfluenceRequest:
    """A report that was written of the scan on the question, by the model of this id."""

    scan: Scan
    question: str
    report: str
    model: str


@dataclass(frozen=True)
class Written:
    """A report, with what it cost.

    `percentile` is how unlike the training scans the scan is, None where the checkpoint keeps no statistics of them;
    `finding_probabilities` are those of the diagnostic prior, None where the checkpoint has none; `prompt_tokens` has
    the visual tokens in it.
    """

    text: str
    question: str
    tokens: int
    finished: bool
    model: dict[str, str]
    spec: dict[str, str]
    batch: int
    cached: bool
    seconds: dict[str, float]
    checkpoint: str
    percentile: float | None = None
    finding_probabilities: dict[str, float] | None = None
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Status:
    """What the replica can do now. `spec` is what scans must be prepared by."""

    ready: bool
    why: str = ""
    model: dict[str, str] = field(default_factory=dict)
    spec: PreprocessSpec | None = None
    question: str = ""
    waiting: int = 0
    warm_up_seconds: float | None = None

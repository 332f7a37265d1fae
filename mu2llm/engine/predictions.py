"""What is asked of checkpoints, and what they wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import pyarrow as pa

from mu2llm import artefacts
from mu2llm.artefacts import Identity, open_checkpoint
from mu2llm.cases import Shards
from mu2llm.engine.sampling import Decoding
from mu2llm.records import Case, Record
from mu2llm.settings.inference import InferenceConfig

Variant = Literal["as_is", "shuffled", "zeroed", "table"]
VARIANTS: tuple[Variant, ...] = ("as_is", "shuffled", "zeroed")
"""With the case's own scan, with another patient's, with an empty one. A checkpoint is not asked for the fourth: what a
table of training reports has for the findings that it named."""
_DECIDES = {"variants", "regions", "max_cases", "max_new_tokens", "samples", "temperature", "top_p", "seed"}


class Prediction(Record):
    """One text that a checkpoint (`run`) wrote for a case; `scan_of` is the case whose scan it saw, "" for none."""

    run: str
    case_id: str
    variant: Variant
    region: str | None
    question: str
    index: int
    text: str
    tokens: int
    finished: bool
    scan_of: str
    seed: int

    arrow_schema: ClassVar[pa.Schema] = pa.schema(
        [
            *[pa.field(name, pa.string()) for name in ("run", "case_id", "variant", "region", "question")],
            pa.field("index", pa.int32()),
            pa.field("text", pa.string()),
            pa.field("tokens", pa.int32()),
            pa.field("finished", pa.bool_()),
            pa.field("scan_of", pa.string()),
            pa.field("seed", pa.int64()),
        ]
    )


@dataclass(frozen=True)
class Request:
    """What is to be written: by which checkpoints (run → URI), for which cases, on what question.

    `data` is the URI of shards or of their cached features; `ids` are the split's cases that are meant (none: all).
    `regions` also asks each case's own questions about a region of the body, with the scan as it is.
    """

    checkpoints: Mapping[str, str]
    data: str
    split: str
    question: str
    decoding: Decoding = field(default_factory=Decoding)
    variants: tuple[Variant, ...] = ("as_is",)
    regions: bool = False
    max_cases: int | None = None
    ids: tuple[str, ...] | None = None
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    @property
    def identity(self) -> Identity:
        """All that decides what is written: not how many cases are written at a time, nor whether scans are cached."""
        inputs: dict[str, Any] = {"split": self.split, "question": self.question}
        for prefix, values in (("", self), ("decoding.", self.decoding)):
            for each in fields(values):
                value = getattr(values, each.name)
                if each.name in _DECIDES and value != each.default:
                    inputs[f"{prefix}{each.name}"] = value
        inputs |= self.inference.rounding
        inputs |= {} if self.ids is None else {"ids": artefacts.digest(self.ids)}
        inputs["data"] = Shards.open(self.data).origin_checksum
        for run, uri in self.checkpoints.items():
            inputs[f"checkpoint.{run}"] = artefacts.weights_of(open_checkpoint(uri)).weights
        return Identity.of(inputs)

    def cases(self, shards: Shards) -> list[Case]:
        """The cases that are meant, in the shards' order."""
        return shards.cases(self.split, self.rows(shards))

    def rows(self, shards: Shards) -> list[int]:
        """Their numbers in the split."""
        names, ids = shards.ids(self.split), None if self.ids is None else set(self.ids)
        return [row for row, name in enumerate(names) if ids is None or name in ids][: self.max_cases]

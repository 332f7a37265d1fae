"""Settings of scans and shards: phantoms, splits, preprocessing."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mu2llm.records import PreprocessSpec
from mu2llm.settings.section import Execution, Section


class PhantomConfig(Section):
    """The procedural phantoms of `mu2llm phantom` and of the demo."""

    cases: int = Field(800, ge=1)
    prevalence: float = Field(0.2, ge=0.15, le=0.25, description="fraction of the cases that have a finding")
    nodules: Literal["balls", "lidc"] = Field(
        "balls", description="lung nodules: balls of 25 to 35 mm, or of LIDC's sizes and shapes (needs the extra lidc)"
    )


class DataConfig(Section):
    spec: PreprocessSpec
    split: dict[Literal["train", "validation", "test"], float] = Field(
        {"train": 0.8, "validation": 0.1, "test": 0.1}, description="fraction of the patients in each"
    )
    rejection_budget: Execution[float] = Field(
        0.05, ge=0, le=1, description="fraction of rejected scans over which ingest fails"
    )
    exclude: tuple[str, ...] = Field((), description="ids or URIs of cases that ingest goes on without")
    accept: tuple[str, ...] = Field((), description="warning or reason codes that are let in, such as not_hu")
    reconstructions: Literal["one", "all", "together"] = Field(
        "one",
        description="series of a study, reconstructions of a scan: one of them, each a case of its own, or "
        "`spec.series` of them together as one case",
    )
    collections: tuple[str, ...] = Field((), description="idc: collections to take, such as lidc_idri; none: all")
    shard_mb: int = Field(128, ge=1, description="aimed size of a Parquet shard")
    shuffle_rows: int = Field(1, ge=1, description="neighbouring rows that stay together when an epoch is shuffled")
    fraction: float = Field(
        1, gt=0, le=1, description="fraction of the training patients, drawn by the seed, that sft and prefer see"
    )
    phantom: PhantomConfig = PhantomConfig()

    @property
    def together(self) -> bool:
        """Whether the series of a study are one case without a manifest that lists them."""
        return self.reconstructions == "together"

    @model_validator(mode="after")
    def _several(self) -> Self:
        if self.together and self.spec.series == 1:
            raise ValueError("data.reconstructions=together needs data.spec.series of 2 or more, it is 1")
        return self

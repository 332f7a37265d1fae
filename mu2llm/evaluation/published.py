"""Numbers that others published (published.yaml), to stand beside ours."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml
from pydantic import BaseModel, model_validator


class Publication(BaseModel):
    """One table of a source: run → a number for each of the `columns`, and why they are not comparable with ours.

    `floors` (floor → metric → number) are measured by us on `floors_of`.
    """

    source: str
    url: str
    data: str
    split: str
    judge: str
    why: str
    columns: list[str]
    rows: dict[str, list[float | None]]
    floors_of: str = ""
    floors: dict[str, dict[str, float]] = {}

    @model_validator(mode="after")
    def _is_a_table(self) -> Publication:
        for run, values in self.rows.items():
            if len(values) != len(self.columns):
                raise ValueError(f"{self.source}, {run}: {len(values)} numbers for {len(self.columns)} columns")
        return self

    def metrics(self, run: str) -> dict[str, float | None]:
        """The numbers of a run by metric."""
        return dict(zip(self.columns, self.rows[run], strict=True))


@cache
def publications() -> list[Publication]:
    """All of them, in the file's order."""
    text = (files("mu2llm.evaluation") / "published.yaml").read_text(encoding="utf-8")
    return [Publication.model_validate(each) for each in yaml.safe_load(text)]


def ablation() -> list[dict[str, float | None]]:
    """The rows of the paper's ablation (table 2), in its order."""
    [table] = [each for each in publications() if each.source.endswith("table 2")]
    return [table.metrics(run) for run in table.rows]

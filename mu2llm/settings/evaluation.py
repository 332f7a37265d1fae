"""Settings of evaluation: what is written, how it is measured."""

from __future__ import annotations

from pydantic import Field

from mu2llm.settings.section import Execution, Section


class EvaluationConfig(Section):
    batch_size: Execution[int] = Field(16, ge=1, description="cases that an actor writes at a time")
    max_new_tokens: int = 256
    max_cases: int | None = None
    bootstrap: int = Field(1000, ge=100)
    regions: bool = Field(True, description="also ask the cases' own questions about a region of the body")
    pages: Execution[int] = Field(10, ge=0, description="cases that the report shows with their scans")
    actors: Execution[int] = Field(1, ge=1)
    cpus_per_actor: Execution[float] = 1
    gpus_per_actor: Execution[float] = 0
    question: str = "Write the radiology report of this CT scan."
    text_encoder: str = Field("minilm", description="encoder of BERTScore")

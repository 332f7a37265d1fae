"""Settings of evaluation: what is written, how it is measured."""

from __future__ import annotations

from pydantic import Field

from mu2llm.settings.inference import InferenceConfig
from mu2llm.settings.section import Execution


class EvaluationConfig(InferenceConfig):
    actors: Execution[int | None] = Field(1, ge=1, description="None: as many as the cluster has room for")
    max_new_tokens: int = 256
    max_cases: int | None = None
    bootstrap: int = Field(1000, ge=100)
    paraphrases: int = Field(32, ge=0, description="references that the judge gets in other words, to audit it")
    regions: bool = Field(True, description="also ask the cases' own questions about a region of the body")
    pages: Execution[int] = Field(10, ge=0, description="cases that the report shows with their scans")
    external: dict[str, str] = Field({}, description="metrics of other programs: name → command")
    question: str = "Write the radiology report of this CT scan."
    text_encoder: str = Field("minilm", description="encoder of BERTScore; none leaves it out")

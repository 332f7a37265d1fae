"""Settings of the judge."""

from __future__ import annotations

from pydantic import Field

from mu2llm.settings.section import Execution, Section

NAMES = (
    "rules, hf:NAME_OR_PATH, openai:MODEL@URL, crimson:MODEL@URL, python:MODULE:CLASS (a judge) or "
    "python:MODULE:CLASS@openai:MODEL@URL (a rubric asked of a model; or @hf:NAME)"
)


class JudgeConfig(Section):
    name: str = Field("rules", description=NAMES)
    batch_size: Execution[int] = 8
    max_new_tokens: int = 1024
    truncate_words: int | None = Field(None, description="the published cut at 300 words; None judges by section")
    concurrency: Execution[int] = Field(8, description="requests to an endpoint at once")
    actors: Execution[int | None] = Field(
        None, ge=1, description="that judge with an hf: model; None: as many as the cluster has room for"
    )
    cpus_per_actor: Execution[float] = Field(1, ge=0)
    gpus_per_actor: Execution[float | None] = Field(
        None, ge=0, description="None: one where the cluster has GPUs, else none"
    )
    requests_per_minute: Execution[float | None] = None
    cache: Execution[str | None] = Field(None, description="URI of the cache of a language model's judgements")
    prompt: str | None = Field(None, description="URI of a prompt with {reference} and {candidate}, instead of ours")

"""Settings of the judge."""

from __future__ import annotations

from pydantic import Field

from mu2llm.settings.section import Execution, Section


class JudgeConfig(Section):
    name: str = Field("rules", description="rules, hf:NAME_OR_PATH, openai:MODEL@URL or python:MODULE:CLASS")
    batch_size: Execution[int] = 8
    max_new_tokens: int = 1024
    truncate_words: int | None = Field(None, description="the published cut at 300 words; None judges by section")
    concurrency: Execution[int] = 8
    requests_per_minute: Execution[float | None] = None
    cache: Execution[str | None] = Field(None, description="URI of the cache of a language model's judgements")
    prompt: str | None = Field(None, description="URI of a prompt with {reference} and {candidate}, instead of ours")

"""A judge that asks a language model: prompts, sections, parsing. Which model, is the writer's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mu2llm.green.judge import Pair, unjudged
from mu2llm.green.parser import parse
from mu2llm.green.prompt import Prompt
from mu2llm.green.sections import combine, sections, truncated
from mu2llm.records import Judgement


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A prompt to which there is no answer, and why."""

    why: str


class Writer(Protocol):
    """A language model that answers prompts, greedily."""

    @property
    def identity(self) -> str:
        """Name and weights or endpoint, and decoding."""
        ...

    def write(self, prompts: list[str]) -> list[str | Unanswered]:
        """One answer to each prompt; a Failure if the model cannot be reached at all."""
        ...


class PromptedJudge:
    """GREEN by a language model. Reports over 300 words are judged by section, or cut if `truncate_words` says so."""

    def __init__(self, writer: Writer, prompt: Prompt, truncate_words: int | None = None) -> None:
        self._writer, self._prompt, self._truncate_words = writer, prompt, truncate_words

    @property
    def identity(self) -> str:
        reading = f"cut {self._truncate_words} words" if self._truncate_words else "by section"
        return f"{self._writer.identity}, prompt {self._prompt.version}, {reading}"

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """One judgement a pair. Equal prompts are asked once."""
        settled = [unjudged(pair, self.identity) for pair in pairs]
        asked = [
            [] if known else [self._prompt.fill(*part) for part in self._divide(pair)]
            for pair, known in zip(pairs, settled, strict=True)
        ]
        prompts = list(dict.fromkeys(prompt for prompts in asked for prompt in prompts))
        answers = dict(zip(prompts, self._writer.write(prompts), strict=True)) if prompts else {}
        return [
            known or combine([self._read(answers[prompt]) for prompt in prompts])
            for known, prompts in zip(settled, asked, strict=True)
        ]

    def _divide(self, pair: Pair) -> list[Pair]:
        return [truncated(pair, self._truncate_words)] if self._truncate_words else sections(pair)

    def _read(self, answer: str | Unanswered) -> Judgement:
        if isinstance(answer, Unanswered):
            return Judgement(valid=False, score=None, why=answer.why, judge=self.identity)
        return parse(answer).model_copy(update={"judge": self.identity})

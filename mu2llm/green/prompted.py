"""A judge that asks a language model. What it asks and reads is the rubric's business, which model the writer's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mu2llm.green.judge import Pair, unjudged
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

    def answers(self, prompts: list[str]) -> Iterator[tuple[int, str | Unanswered]]:
        """The number of each prompt and its answer, as they come; a Failure if the model cannot be reached at all."""
        ...


class Rubric(Protocol):
    """What a language model is asked about a pair of reports, and what its answer means.

    `measures` names the metric of the scores. `by_section`: reports over 300 words are judged in parts, whose counts
    add up to GREEN's; otherwise as a whole. `version` changes with what is asked or how it is read.
    """

    measures: str
    by_section: bool
    version: str

    def fill(self, reference: str, candidate: str) -> str:
        """The prompt."""
        ...

    def read(self, answer: str) -> Judgement:
        """An answer that is none is an invalid judgement with its reason in `why`."""
        ...


class PromptedJudge:
    """A rubric asked of a language model. Reports are cut first if `truncate_words` says so."""

    def __init__(self, writer: Writer, rubric: Rubric, truncate_words: int | None = None) -> None:
        self._writer, self._rubric, self._truncate_words = writer, rubric, truncate_words
        self.measures = rubric.measures

    @property
    def identity(self) -> str:
        whole = "by section" if self._rubric.by_section else "whole reports"
        reading = f"cut {self._truncate_words} words" if self._truncate_words else whole
        return f"{self._writer.identity}, prompt {self._rubric.version}, {reading}"

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """One judgement a pair, in their order."""
        found = dict(self.each(pairs))
        return [found[number] for number in range(len(pairs))]

    def each(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        """The number of each pair and its judgement, as they come. Equal prompts are asked once."""
        asked: dict[int, list[str]] = {}
        waiting: dict[str, set[int]] = {}
        for number, pair in enumerate(pairs):
            if known := unjudged(pair, self.identity):
                yield number, known
                continue
            asked[number] = [self._rubric.fill(*part) for part in self._divide(pair)]
            for prompt in asked[number]:
                waiting.setdefault(prompt, set()).add(number)
        if not asked:
            return
        prompts = list(waiting)
        read: dict[str, Judgement] = {}
        for place, answer in self._writer.answers(prompts):
            read[prompts[place]] = self._read(answer)
            for number in sorted(waiting[prompts[place]]):
                if all(prompt in read for prompt in asked[number]):
                    yield number, combine([read[prompt] for prompt in asked[number]])

    def _divide(self, pair: Pair) -> list[Pair]:
        if self._truncate_words:
            return [truncated(pair, self._truncate_words)]
        return sections(pair) if self._rubric.by_section else [pair]

    def _read(self, answer: str | Unanswered) -> Judgement:
        if isinstance(answer, Unanswered):
            return Judgement(valid=False, score=None, why=answer.why, judge=self.identity)
        return self._rubric.read(answer).model_copy(update={"judge": self.identity})

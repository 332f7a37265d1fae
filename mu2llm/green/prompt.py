"""What a language model is asked, and the format of its answer (METHOD.md §4.1).

The structure, the headings and the names of the error types are GREEN's, which its models were trained to
answer; the words between them are ours. Whoever has the published prompt gives it as a template.
"""

from __future__ import annotations

import re

from mu2llm.artefacts import digest
from mu2llm.errors import UserError
from mu2llm.green.judge import GREEN
from mu2llm.green.parser import parse
from mu2llm.records import ERROR_CATEGORIES, Judgement

_TYPES = "\n".join(f"({letter}) {name}" for letter, name in ERROR_CATEGORIES.items())
_SLOT = "<type of error>: <number of errors>. <error 1>; <error 2>; ...; <error n>"
_FORMAT = "\n".join(f"({letter}) {_SLOT}" for letter in ERROR_CATEGORIES)
TEMPLATE = f"""You are to judge how well a candidate radiology report agrees with a reference report that \
radiologists wrote.

1. Criteria

Find every error of the candidate and count two kinds of them apart: those that matter clinically and those \
that do not. Each error is of one of these types:

{_TYPES}

What is judged are findings, not wording or style.

2. Reference report:
{{reference}}

3. Candidate report:
{{candidate}}

4. Format

Answer in exactly this format, also where there is no error of a type (its number is then 0):

[Explanation]:
<explanation>

[Clinically Significant Errors]:
{_FORMAT}

[Clinically Insignificant Errors]:
{_FORMAT}

[Matched Findings]:
<number of matched findings>. <finding 1>; <finding 2>; ...; <finding n>
"""


_SLOTS = re.compile(r"(.*)\{reference\}(.*)\{candidate\}(.*)", re.DOTALL)


class Prompt:
    """GREEN's rubric: a template with {reference} and, behind it, {candidate}; `version` changes with its words."""

    measures, by_section = GREEN, True

    def __init__(self, template: str = TEMPLATE) -> None:
        slots = _SLOTS.fullmatch(template)
        if not slots:
            raise UserError("the judge's prompt must hold {reference} and, behind it, {candidate}")
        self._parts = slots.groups()
        self.version = digest(template)

    def fill(self, reference: str, candidate: str) -> str:
        before, between, after = self._parts
        return f"{before}{reference}{between}{candidate}{after}"

    def read(self, answer: str) -> Judgement:
        return parse(answer)


def write_answer(judgement: Judgement, explanation: str = "") -> str:
    """A valid judgement in GREEN's format, so that `parse` gives its counts and sentences back."""
    parts = [f"[Explanation]:\n{explanation}"] if explanation else []
    for heading, counts, sentences in (
        ("[Clinically Significant Errors]", judgement.significant, judgement.significant_sentences),
        ("[Clinically Insignificant Errors]", judgement.insignificant, judgement.insignificant_sentences),
    ):
        said = sentences or ((),) * len(counts)
        rows = zip(ERROR_CATEGORIES.items(), counts, said, strict=True)
        lines = [f"({letter}) {name}: {_counted(count, words)}" for (letter, name), count, words in rows]
        parts.append("\n".join([f"{heading}:", *lines]))
    parts.append(f"[Matched Findings]:\n{_counted(judgement.matched, judgement.matched_sentences)}")
    return "\n\n".join(parts)


def _counted(count: int, sentences: tuple[str, ...]) -> str:
    return f"{count}. {'; '.join(sentences)}." if sentences else f"{count}."

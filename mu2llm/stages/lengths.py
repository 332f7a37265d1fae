"""Texts longer than the model takes beside a scan: found before a training begins, by case."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from mu2llm.errors import UserError
from mu2llm.model import Mu2Processor
from mu2llm.records import Case

Asked = tuple[str, str]
"""(question, answer)"""
NAMED = 5  # cases that a message names


def asked_of(case: Case, question: str, report_share: float) -> list[Asked]:
    """All that a training may ask of a case."""
    own = [] if report_share == 1 else [(each.question, each.answer) for each in case.questions]
    return [(question, case.report), *own]


def too_long(processor: Mu2Processor, texts: Mapping[str, Sequence[Asked]]) -> dict[str, int]:
    """By case, the tokens of its longest text, where they are more than `processor.max_text_tokens`."""
    flat = [(name, question, answer) for name, asked in texts.items() for question, answer in asked]
    if not flat:
        return {}
    prompts = {question: processor.text_tokens(question) for question in {question for _, question, _ in flat}}
    answers = processor.tokenizer(
        [answer for *_, answer in flat], add_special_tokens=False, split_special_tokens=True
    ).input_ids
    found: dict[str, int] = {}
    for (name, question, _), ids in zip(flat, answers, strict=True):
        tokens = prompts[question] + len(ids) + 1
        if tokens > processor.max_text_tokens:
            found[name] = max(tokens, found.get(name, 0))
    return found


def settle(found: Mapping[str, int], of: int, limit: int, too_long: str) -> None:
    """A UserError that names the cases where they are to be refused, else a warning that counts them."""
    if not found:
        return
    named = ", ".join(f"{name} ({tokens} tokens)" for name, tokens in list(found.items())[:NAMED])
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    what = f"{len(found)} of {of} cases are longer than the {limit} tokens that the model takes beside the scan"
    if too_long == "refuse":
        raise UserError(
            f"{what}: {named}{more}; set model.max_text_tokens={max(found.values())}, or sft.too_long=skip or truncate"
        )
    done = "left out" if too_long == "skip" else "cut at their last whole sentence"
    logging.getLogger(__name__).warning("%s, and are %s: %s%s", what, done, named, more)


def shortened(processor: Mu2Processor, question: str, answer: str) -> str:
    """An answer that fits with its question: as it is, or cut behind its last whole sentence (else word)."""
    while processor.text_tokens(question, answer) > processor.max_text_tokens:
        beyond = processor.text_tokens(question, answer) - processor.max_text_tokens
        ids = processor.tokenizer(answer, add_special_tokens=False, split_special_tokens=True).input_ids
        kept = str(processor.tokenizer.decode(ids[: -beyond - 1])).rstrip()
        if not kept:
            raise UserError(f"a question alone is longer than model.max_text_tokens={processor.max_text_tokens}")
        sentence = max(kept.rfind(stop) for stop in (". ", "! ", "? ", ".\n"))
        answer = kept[: sentence + 1] if sentence > 0 else kept.rpartition(" ")[0] or kept
    return answer

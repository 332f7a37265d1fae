"""What a judge is, and how one is chosen by its configuration."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mu2llm import storage
from mu2llm.config import JudgeConfig
from mu2llm.errors import UserError
from mu2llm.records import Judgement

if TYPE_CHECKING:
    from mu2llm.green.prompt import Prompt
    from mu2llm.green.prompted import Writer

Pair = tuple[str, str]
"""(reference, candidate)"""

# words that only one of them has, of the languages in which reports reach us
_FOREIGN = re.compile(
    r"\b(?:der|die|das|und|kein|keine|nicht|mit|ist|le|la|les|des|du|et|pas|sans|est|dans|el|los|las|una|sin|con|del|y|"
    r"il|della|nessun|nessuna|ve|bir|yok|izlenmedi|izlendi|saptanmadı|em|sem|não|uma|het|een|geen|niet|van|nie|jest)\b"
)
_ENGLISH = re.compile(r"\b(?:the|is|are|was|were|of|and|with|no|not|there|without|within|for|both|on|to|in)\b")


class Judge(Protocol):
    """Scores candidate reports against reference reports as GREEN does (METHOD.md §4.1)."""

    @property
    def identity(self) -> str:
        """What two judgements must share to be comparable: name, weights or endpoint, prompt, decoding."""
        ...

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """(reference, candidate) pairs → one judgement each, in their order."""
        ...


def load_judge(config: JudgeConfig) -> Judge:
    """The judge that `config.name` names; a UserError says which names there are.

    Rules are quicker than any cache; a language model's judgements are kept under `config.cache`, if given.
    """
    if config.name == "rules":
        from mu2llm.green.rules import RulesJudge

        return RulesJudge()
    from mu2llm.green.cache import CachedJudge
    from mu2llm.green.prompted import PromptedJudge

    if foreign := re.fullmatch(r"python:([\w.]+):(\w+)", config.name):
        judge = _foreign(foreign[1], foreign[2], config)
    else:
        judge = PromptedJudge(_writer(config), _prompt(config.prompt), config.truncate_words)
    return CachedJudge(judge, config.cache) if config.cache else judge


def _foreign(module: str, name: str, config: JudgeConfig) -> Judge:
    """A judge that is no part of this room: a class that is made of the configuration."""
    try:
        made: Judge = getattr(importlib.import_module(module), name)(config)
        return made
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"judge {config.name}: {error}; give python:MODULE:CLASS of one that can be imported"
        ) from error


def _writer(config: JudgeConfig) -> Writer:
    if local := re.fullmatch(r"hf:(.+)", config.name):
        from mu2llm.green.local import LocalWriter

        return LocalWriter(local[1], config.batch_size, config.max_new_tokens)
    if remote := re.fullmatch(r"openai:(.+?)@(\w+://.+)", config.name):
        from mu2llm.green.endpoint import EndpointWriter

        return EndpointWriter(
            remote[1], remote[2], config.max_new_tokens, config.concurrency, config.requests_per_minute
        )
    raise UserError(
        f"judge {config.name!r} is not known; give rules, hf:NAME_OR_PATH, openai:MODEL@URL or python:MODULE:CLASS"
    )


def _prompt(uri: str | None) -> Prompt:
    from mu2llm.green.prompt import Prompt

    if uri is None:
        return Prompt()
    if not storage.exists(uri):
        raise UserError(f"judge.prompt {uri}: there is no such file")
    return Prompt(storage.read_bytes(uri).decode())


def unreadable(pair: Pair) -> str | None:
    """Why no judge can say anything about a pair of reports, or None if one can."""
    for role, text in zip(("reference", "candidate"), pair, strict=True):
        letters = re.findall(r"[^\W\d_]", text)
        if not letters:
            return f"the {role} report is empty"
        latin, lower = sum(letter < "\u0250" for letter in letters), text.lower()
        if latin < 0.7 * len(letters) or len(_FOREIGN.findall(lower)) > len(_ENGLISH.findall(lower)):
            return f"the {role} report is not in English"
    return None

"""Which judge a configuration names."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING

from mu2llm import storage
from mu2llm.errors import UserError
from mu2llm.green.judge import Judge
from mu2llm.settings.green import JudgeConfig

if TYPE_CHECKING:
    from mu2llm.green.prompt import Prompt
    from mu2llm.green.prompted import Writer

_LANGUAGE_MODEL = re.compile(r"hf:.+|openai:.+?@\w+://.+")


def check_judge(config: JudgeConfig) -> None:
    """A UserError where there is no such judge or prompt; no weights are loaded and no endpoint is asked."""
    if config.name != "rules" and not config.name.startswith("python:") and not _LANGUAGE_MODEL.fullmatch(config.name):
        raise _unknown(config)
    if config.prompt is not None:
        _prompt(config.prompt)


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
    raise _unknown(config)


def _unknown(config: JudgeConfig) -> UserError:
    return UserError(
        f"judge {config.name!r} is not known; give rules, hf:NAME_OR_PATH, openai:MODEL@URL or python:MODULE:CLASS"
    )


def _prompt(uri: str | None) -> Prompt:
    from mu2llm.green.prompt import Prompt

    if uri is None:
        return Prompt()
    if not storage.exists(uri):
        raise UserError(f"judge.prompt {uri}: there is no such file")
    return Prompt(storage.read_bytes(uri).decode())

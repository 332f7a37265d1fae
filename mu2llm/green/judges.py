"""Which judge a configuration names."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mu2llm import storage
from mu2llm.errors import UserError
from mu2llm.green.judge import Judge
from mu2llm.settings.green import NAMES, JudgeConfig

if TYPE_CHECKING:
    from mu2llm.green.prompt import Prompt
    from mu2llm.green.prompted import Rubric, Writer

    LocalModel = Callable[[str, JudgeConfig], Writer]

_ENDPOINT = r"(?P<model>.+?)@(?P<url>\w+://.+)"
_WRITER = rf"hf:(?P<local>.+)|openai:{_ENDPOINT}"
_GREEN = re.compile(_WRITER)
_CRIMSON = re.compile(f"crimson:{_ENDPOINT}")
_RUBRIC = re.compile(rf"python:(?P<module>[\w.]+):(?P<name>\w+)@(?:{_WRITER})")
_JUDGE = re.compile(r"python:(?P<module>[\w.]+):(?P<name>\w+)")


def check_judge(config: JudgeConfig) -> None:
    """A UserError where there is no such judge, rubric or prompt; no weights are loaded and no endpoint is asked."""
    if config.name != "rules" and not _JUDGE.fullmatch(config.name):
        _rubric(config)


def rubric_version(config: JudgeConfig) -> str | None:
    """Of what is asked and how it is read, where that is not GREEN's; None for every other judge."""
    other = _CRIMSON.fullmatch(config.name) or _RUBRIC.fullmatch(config.name)
    return _rubric(config)[0].version if other else None


def load_judge(config: JudgeConfig, local: LocalModel | None = None) -> Judge:
    """The judge that `config.name` names; a UserError says which names there are.

    `local` makes the writer of a model by name, if it is not to be loaded into this process. Rules are quicker than any
    cache; a language model's judgements are kept under `config.cache`, if given.
    """
    if config.name == "rules":
        from mu2llm.green.rules import RulesJudge

        return RulesJudge()
    from mu2llm.green.cache import CachedJudge
    from mu2llm.green.prompted import PromptedJudge

    judge: Judge
    if own := _JUDGE.fullmatch(config.name):
        judge = _imported(own, config)(config)
    else:
        rubric, model = _rubric(config)
        judge = PromptedJudge(_writer(model, config, local), rubric, config.truncate_words)
    return CachedJudge(judge, config.cache) if config.cache else judge


def _rubric(config: JudgeConfig) -> tuple[Rubric, re.Match[str]]:
    """What a language model is asked, and which one."""
    if model := _CRIMSON.fullmatch(config.name):
        from mu2llm.green.crimson import Crimson

        return Crimson(model["model"]), model
    if model := _RUBRIC.fullmatch(config.name):
        return _imported(model, config)(config), model
    if model := _GREEN.fullmatch(config.name):
        return _prompt(config.prompt), model
    raise UserError(f"judge {config.name!r} is not known; give {NAMES}")


def _imported(named: re.Match[str], config: JudgeConfig) -> Any:
    """A class that is no part of this room, to be made of the configuration."""
    try:
        return getattr(importlib.import_module(named["module"]), named["name"])
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"judge {config.name}: {error}; give python:MODULE:CLASS of one that can be imported"
        ) from error


def _writer(model: re.Match[str], config: JudgeConfig, local: LocalModel | None) -> Writer:
    if name := model.groupdict().get("local"):
        if local:
            return local(name, config)
        from mu2llm.green.local import LocalWriter

        return LocalWriter(name, config.batch_size, config.max_new_tokens)
    from mu2llm.green import crimson
    from mu2llm.green.endpoint import EndpointWriter

    tokens, request = config.max_new_tokens, None
    if model.re is _CRIMSON:
        tokens, request = max(tokens, crimson.MAX_NEW_TOKENS), crimson.REQUEST
    return EndpointWriter(
        model["model"], model["url"], tokens, config.concurrency, config.requests_per_minute, request=request
    )


def _prompt(uri: str | None) -> Prompt:
    from mu2llm.green.prompt import Prompt

    if uri is None:
        return Prompt()
    if not storage.exists(uri):
        raise UserError(f"judge.prompt {uri}: there is no such file")
    return Prompt(storage.read_bytes(uri).decode())

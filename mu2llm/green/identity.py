"""What decides a judge's verdicts, told by its configuration: a language model is not loaded for it."""

from __future__ import annotations

from typing import Any

from mu2llm import artefacts, storage
from mu2llm.green.judges import rubric_version
from mu2llm.settings.green import JudgeConfig


def rules_identity() -> str:
    """The version of the rules: another one reads other findings in the same reports."""
    from mu2llm.green.rules import RulesJudge

    return RulesJudge().identity


def decides(config: JudgeConfig) -> dict[str, Any]:
    """Inputs of an identity: the rules by their version, a model in a folder by its weights, a prompt by its text."""
    if config.name == "rules":
        return {"judge": rules_identity()}
    found = {**artefacts.decides("judge", config), "judge": config.name}
    if version := rubric_version(config):
        found["judge.rubric"] = version
    kind, _, name = config.name.partition(":")
    if kind == "hf" and storage.exists(name):
        found["judge.weights"] = artefacts.folder_weights(name).weights
    if config.prompt and storage.exists(config.prompt):
        found["judge.prompt"] = artefacts.digest(storage.read_bytes(config.prompt).decode())
    return found

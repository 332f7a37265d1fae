"""What all settings have in common: frozen, and no key that is not known."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")
EXECUTION = "execution"
Execution = Annotated[T, EXECUTION]
"""The type of a setting that says how work is done, followed or shown, and not what comes of it: where it differs,
nothing is done again (`artefacts.decides`)."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested values of `base`, with those of `over` laid over them."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result

"""Why one process of the service gives another no result: a value, since it is an answer and not a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mu2llm.errors import Rejection

T = TypeVar("T")


@dataclass(frozen=True)
class Refusal:
    """`reason` is a code, `message` what else is to be said.

    Of a reader: a reason code of `mu2llm.ct`, `slow`, `crashed`, `storage` or `unreadable`. Of a generator:
    `not_ready`, `wrong_spec` (the scan was prepared by another spec), `another_model` (than wrote the report),
    `too_long`, `engine_down` or `engine_refused` by the server of its language model, or `broken` by an unexpected
    error, of which `message` says where. Of the scorer: `busy` or `down`.
    """

    reason: str
    message: str = ""


def attempted(action: Callable[[], T]) -> T | Refusal:
    """What it gives, or what is wrong with the scan or its storage. Of an unexpected error its kind alone is told."""
    try:
        return action()
    except Rejection as rejection:
        return Refusal(rejection.reason, rejection.message)
    except MemoryError:
        return Refusal("too_large")
    except OSError:
        return Refusal("storage")
    except Exception as error:
        return Refusal("unreadable", type(error).__name__)

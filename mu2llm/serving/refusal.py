"""Why one process of the service gives another no result: a value, since it is an answer and not a fault."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """`reason` is a code, `message` what else is to be said.

    Of a reader: a reason code of `mu2llm.ct`, `slow`, `crashed`, `storage` or `unreadable`. Of a generator:
    `not_ready`, `wrong_spec` (the scan was prepared by another spec), `too_long`, or `broken` by an unexpected error,
    of which `message` says where. Of the scorer: `busy` or `down`.
    """

    reason: str
    message: str = ""

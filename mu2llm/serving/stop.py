"""Stop sequences: where a text ends that is not to hold them."""

from __future__ import annotations

from collections.abc import Sequence


def before_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stop sequences, and whether there is one."""
    places = [text.index(each) for each in stop if each in text]
    return (text[: min(places)], True) if places else (text, False)


def without_begun_stop(text: str, stop: Sequence[str]) -> str:
    """The text without an end that further tokens may make a stop sequence."""
    begun = [length for each in stop for length in range(1, len(each)) if text.endswith(each[:length])]
    return text[: len(text) - max(begun, default=0)]

"""Unexpected errors, told without their message: it may hold what a client sent."""

from __future__ import annotations

import traceback

FRAMES = 5


def where(error: BaseException) -> str:
    """Its type and that of its cause, and the places in the code that it passed, the last ones."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    places = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
    cause = f" of {type(error.__cause__).__name__}" if error.__cause__ else ""
    return " < ".join([f"{type(error).__name__}{cause}", *reversed(places)])

"""Where an export goes: nothing is overwritten unasked, and a folder says what made it."""

from __future__ import annotations

from typing import Any

import mu2llm
from mu2llm import storage
from mu2llm.errors import UserError

MADE_BY = "export.json"


def clear(out: str, fresh: bool) -> None:
    """Makes room at `out`. A UserError where something is there, but for an export with `fresh`, which goes."""
    if not storage.exists(out):
        return
    if not fresh:
        raise UserError(f"--out {out} is there already; give another place, or --fresh to replace an export")
    if not storage.is_file(out) and not storage.exists(storage.join(out, MADE_BY)):
        raise UserError(f"--out {out} is a folder without {MADE_BY}, so no export made it; give another place")
    storage.delete(out)


def sign(out: str, kind: str, **of: Any) -> None:
    """Writes into an exported folder what it is, of what, and by which version; last, so that it is whole."""
    storage.write_json(storage.join(out, MADE_BY), {"export": kind, **of, "mu2llm": mu2llm.__version__})

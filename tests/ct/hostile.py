"""What files may be damaged by, and what reading them may end with."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mu2llm.ct import REASONS, WARNINGS, Rejection, read

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=250)

edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "cut", "insert"]), st.binary(max_size=8)),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: list[tuple[float, str, bytes]], head: bool) -> bytes:
    """Bytes set, cut or inserted, anywhere or within the header."""
    changed = bytearray(data)
    for place, action, new in changes:
        at = int(place * (min(len(changed), 420) if head else len(changed)))
        if action == "set":
            changed[at : at + len(new)] = new
        elif action == "insert":
            changed[at:at] = new
        else:
            del changed[at : at + len(new) if len(new) >= 4 else None]
    return bytes(changed)


def is_read_or_rejected(source: bytes | list[bytes]) -> None:
    rejection = None
    try:
        volume = read(source)
    except Rejection as error:
        rejection = error
    if rejection is not None:
        assert rejection.reason in REASONS
        assert rejection.args[2]
        return
    assert set(volume.warnings) <= set(WARNINGS)
    assert volume.hu.min() >= -1024
    assert np.isfinite(volume.hu).all() and np.isfinite(volume.affine).all()

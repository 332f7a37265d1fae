"""What shadows said otherwise, summed up: what a promotion is decided by."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from mu2llm import storage
from mu2llm.errors import UserError
from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.serving.store import StoredComparison


def summaries(state: str) -> list[dict[str, Any]]:
    """Of each shown and shadow checkpoint: GREEN of the shadow's texts against the shown ones with its interval over
    scans, how much longer they are, and how often each finding is told by one alone. A UserError where nothing is kept.
    """
    pairs: defaultdict[tuple[str, str], list[StoredComparison]] = defaultdict(list)
    folder = storage.join(state, "shadow")
    for info in storage.list_files(folder, recursive=False):
        kept = StoredComparison.model_validate(storage.read_json(storage.join(folder, info.base_name)))
        pairs[kept.shown, kept.shadow].append(kept)
    if not pairs:
        raise UserError(f"{state} has nothing of a shadow; give the service's place (serving.state) with --state")
    return [_summary(*pair, kept) for pair, kept in sorted(pairs.items())]


def _summary(shown: str, shadow: str, kept: list[StoredComparison]) -> dict[str, Any]:
    over_scans = Bootstrap([each.scan_sha256 for each in kept])
    green = over_scans.mean([np.nan if each.green is None else each.green for each in kept])
    longer = over_scans.mean([each.shadow_tokens - each.shown_tokens for each in kept])
    alone = {
        f"findings of the {by} alone": dict(Counter(name for each in kept for name in getattr(each, f"{by}_alone")))
        for by in ("shown", "shadow")
    }
    return {
        **{"shown": shown, "shadow": shadow, "reports": len(kept)},
        "green": green and green.model_dump(),
        "tokens_more": longer and longer.model_dump(),
        **alone,
    }

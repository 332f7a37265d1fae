"""What manifests' cells mean: which say nothing, and which names are one name."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

from mu2llm.records import Split

NOTHING = {
    *("", "nan", "na", "n/a", "#n/a", "#n/a n/a", "#na", "<na>", "nat", "null", "none", "nil", "-", "--", "---", "?"),
    *("not given", "not available", "not applicable", "no report", "missing", "empty", "undefined", "unknown"),
}
"""What pandas, R, Excel and people write for nothing, in lower case and without a full stop."""
SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trn", "tr"), "train"),
    **dict.fromkeys(("validation", "validate", "val", "valid", "dev", "development", "tuning", "tune"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "ts", "holdout", "heldout"), "test"),
}
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")


def is_nothing(value: Any) -> bool:
    """Whether a cell says that there is no value."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and " ".join(value.split()).lower().rstrip(".") in NOTHING)


def name_of(value: Any) -> str:
    """An id or a patient as it is compared: without spaces at its ends and what cannot be seen, composed.

    A number that a table keeps as a fraction is the whole number: 1.0 is 1.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", str(value))).strip()


def split_of(value: Any) -> str:
    """The split that a cell names in any case and in the usual words; the cell itself where it names none."""
    words = re.sub(r"[^a-z]+", " ", str(value).lower()).split()
    plain = "".join(word for word in words if word not in ("set", "split", "data", "dataset", "cohort"))
    return SPLITS.get(plain.removesuffix("set") or plain, str(value))

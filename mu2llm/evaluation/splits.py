"""Which cases a score is of: splits by name, and the hash that every score carries.

CT-RATE's validation set is published as 1,564 studies in 3,039 volumes. Thirteen of the studies are no chest CT, and
58 of the others repeat the findings of an earlier one; published numbers use each of the three without saying which.
Where cases are volumes, a study is left out with all of its own (64 without a chest; the published list names 37).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mu2llm.artefacts import digest
from mu2llm.errors import UserError
from mu2llm.records import Case

_NO_CHEST = "109_a 1112_a 1170_a 208_a 257_a 340_a 365_a 417_a 520_a 569_b 726_a 884_a 994_a"
_REPEATED = """
164_a 286_a 293_a 316_a 375_a 376_a 405_a 444_a 485_a 491_a 496_a 553_a 574_a 575_a 602_a 609_a 611_a 616_a 670_a
686_a 688_a 731_a 763_a 787_b 788_a 798_a 800_a 853_a 901_a 922_a 955_a 995_a 1000_a 1012_a 1025_b 1054_a 1070_a
1079_a 1089_a 1090_a 1114_a 1147_a 1156_b 1164_a 1166_a 1185_a 1188_a 1204_a 1206_a 1210_a 1214_b 1222_a 1224_a
1232_a 1243_b 1251_a 1260_a 1286_a
"""
NO_CHEST = frozenset(_NO_CHEST.split())
"""Studies of CT-RATE's validation set that show no chest (forithmus/FORA, scripts/no_chest_valid.txt)."""
REPEATED = frozenset(_REPEATED.split())
"""Chest studies whose findings are those of an earlier one, word for word."""
_STUDY = re.compile(r"valid_(\d+_[a-z]+)(?:_\d+)?(?:\.nii\.gz)?")
KNOWN = {
    "dc5b0e9417a3": "ct-rate-valid",
    "384b47513abc": "ct-rate-valid-chest",
    "ffbba2e896e8": "ct-rate-valid-distinct",
}
"""Digest of the studies → name of the split."""


def split_hash(cases: Sequence[Case]) -> str:
    """Twelve hex digits over ids and reference reports, whatever their order: scores of the same cases share it."""
    return digest(sorted([case.id, " ".join(case.report.split())] for case in cases))


def study(case: Case) -> str:
    """The study of a CT-RATE validation volume, 1_a of valid_1_a_2; "" for other cases."""
    found = _STUDY.fullmatch(case.id)
    return found[1] if found else ""


def named(cases: Sequence[Case], split: str) -> str:
    """The name of the split that these cases are, where it is a known one; else `split`."""
    return KNOWN.get(digest(sorted({study(case) for case in cases})), split)


def select(cases: Sequence[Case], name: str) -> list[Case]:
    """The cases of a named split; a UserError where there is none of that name."""
    if name not in SELECTIONS:
        raise UserError(f"--split {name}: no split of that name; there are {', '.join(SELECTIONS)}")
    chosen = [case for case in cases if study(case) and study(case) not in SELECTIONS[name]]
    if KNOWN.get(digest(sorted({study(case) for case in chosen}))) != name:
        raise UserError(
            f"--split {name}: the references are not CT-RATE's whole validation set; it has {len(chosen)} studies of it"
        )
    return chosen


SELECTIONS: dict[str, frozenset[str]] = {
    "ct-rate-valid": frozenset(),
    "ct-rate-valid-chest": NO_CHEST,
    "ct-rate-valid-distinct": NO_CHEST | REPEATED,
}
"""Name → what of CT-RATE's validation set it leaves out."""

"""The grammar of rewards: `green`, or a weighted sum such as `green+0.5*labels-0.1*length`."""

from __future__ import annotations

import re

REWARDS = {
    "green": "the judge's GREEN",
    "findings": "F1 of the findings, with their sides, that the rules read in report and reference",
    "labels": "F1 of the 18 CT-RATE labels, in the same way",
    "length": "words, for a weight below 0: GREEN alone rewards length",
    "format": "1 where findings and then an impression are there, each once, else 0",
}
"""What each says of a candidate."""
_TERM = re.compile(r"\s*([+-]?)\s*(?:(\d+(?:\.\d+)?|\.\d+)\s*\*)?\s*([a-z_]+)\s*")


def reward_terms(text: str) -> dict[str, float]:
    """Weight by name. Raises ValueError where a name is not known, doubled, or no weight is other than 0."""
    terms: dict[str, float] = {}
    place = 0
    while place < len(text):
        match = _TERM.match(text, place)
        if match is None or (place and not match[1]):
            raise ValueError(f"reward {text!r} is no sum of rewards, such as green+0.5*labels-0.1*length")
        sign, weight, name = match.groups()
        if name not in REWARDS:
            raise ValueError(f"reward {name!r} is not known; there are {', '.join(REWARDS)}")
        if name in terms:
            raise ValueError(f"reward {text!r} names {name} twice")
        terms[name] = float(weight or 1) * (-1 if sign == "-" else 1)
        place = match.end()
    if not any(terms.values()):
        raise ValueError(f"reward {text!r} leaves no spread between candidates: give a weight other than 0")
    return terms

"""Text as people's systems write it → plain lower case, as the lexicon has it."""

from __future__ import annotations

import re
import unicodedata

_INVISIBLE = re.compile("[\u00ad\u200c\u200d\u2060\ufeff]")  # soft hyphen, joiners, byte order mark
_GAPS = re.compile("[\u200b\ufffd\x00-\x1f\x7f]|\\*\\*|__")  # zero-width space, undecodable, control, bold
_DASHES = re.compile("[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]")
_TWICE_ENCODED = re.compile("[\u00c2-\u00f4][\u0080-\u00bf\u0152-\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]{1,3}")
_LETTERS = str.maketrans({"ı": "i", "ø": "o", "æ": "ae", "œ": "oe", "ß": "ss", "’": "'", "‘": "'", "×": "x"})
_BOX, _TICKED = re.compile(r"\[ *\]|[☐□▢]"), re.compile(r"\[ *[x✓✔] *\]|[☑☒✓✔]")
_SIDES = {"l": "left", "r": "right"}
_LOBES = {"u": "upper", "m": "middle", "l": "lower"}
_CHAMBERS = {"a": "atrium", "v": "ventricle"}
_SHORT = {
    re.compile(pattern): words
    for pattern, words in {
        r"\b([lr])([uml])l\b": lambda m: f"{_SIDES[m[1]]} {_LOBES[m[2]]} lobe",
        r"\b([lr])([av])(?= (?:is |are )?(?:\w+ly )?(?:dilat|enlarg))": lambda m: f"{_SIDES[m[1]]} {_CHAMBERS[m[2]]}",
        r"\b([lr])t\b\.?": lambda m: _SIDES[m[1]],
        r"\b([lr])(?=[ -](?:sided|lung|upper|middle|lower|pleura|hilar|kidney|pneumo|effusion|hydro))": lambda m: (
            _SIDES[m[1]]
        ),
        r"\bb/l\b": lambda m: "bilateral",
        r"\bcan't\b": lambda m: "cannot",
        r"n't\b": lambda m: " not",
    }.items()
}


def plain(text: str) -> str:
    """A sentence in lower case and single spaces, without ligatures, accents and what cannot be seen.

    Text that was encoded twice is decoded, RLL and the like are written out, and boxes become words:
    “[ ] nodule” is “no nodule”.
    """
    if not text.isascii():
        text = _TWICE_ENCODED.sub(_decoded, text)
        text = _DASHES.sub("-", _INVISIBLE.sub("", text))
        text = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    text = " ".join(_GAPS.sub(" ", _boxes(text.lower().translate(_LETTERS))).split())
    for pattern, words in _SHORT.items():
        text = pattern.sub(words, text)
    return text


def _decoded(match: re.Match[str]) -> str:
    """UTF-8 that was read as Windows-1252 or Latin-1, read again; as it is where it is none."""
    for encoding in ("cp1252", "latin-1"):
        try:
            return match[0].encode(encoding).decode()
        except UnicodeError:
            continue
    return match[0]


def _boxes(text: str) -> str:
    """Boxes stand before their findings if the first of them does, else behind them."""
    first = min((match.start() for each in (_BOX, _TICKED) if (match := each.search(text))), default=None)
    if first is None:
        return text
    empty, ticked = (" absent; ", " present; ") if text[:first].strip(" -*•") else ("; no ", "; ")
    return _TICKED.sub(ticked, _BOX.sub(empty, text))

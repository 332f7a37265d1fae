"""Lines as a report is laid out → text in which a line end is left only where it means something.

A line end inside a sentence is a space: reports are wrapped by whatever wrote them. It stays where what
follows begins anew: a bullet, a heading, a capital after a whole line, or one finding a line.
"""

from __future__ import annotations

import re
from itertools import pairwise

from mu2llm.green.characters import plain
from mu2llm.green.headings import begins_section, is_heading, parts_heading
from mu2llm.green.lexicon import lexicon

_LINE = re.compile(r"\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]")
_BULLET = re.compile(r"(?:[-–—*•●▪·]|\[ *[xX✓✔]? *\]|[☐□▢☑☒]|#{1,6} )")
_DASH = re.compile(r"[-–—*]")
_NUMBERED = re.compile(r"\(?(\d{1,2})[.)](?:\s+(?=\D)|(?=[A-Z]))")
_ENDED = re.compile(r"[.!:;][\"'”’)\]*_]*$")
_OPEN = re.compile(
    r"(?:[(/&+-]|(?<!\w)(?:a|an|the|of|in|on|at|to|for|from|by|with|without|and|or|nor|no|not|any|but|as|than|is|are|was|"
    r"were|be|been|has|have|had|which|that|this|these|those|both|either|neither|its|their|into|within|between|around|"
    r"along|near|per|via|over|under|due|up|down|dr|prof|multiple|several|previous|prior|pulmonary|pleural|pericardial|hiatal|"
    r"interlobular|peribronchial|suggests?|shows?|reveals?|demonstrates?|including|measuring|dated))$",
    re.IGNORECASE,
)
_MODIFIER = re.compile(
    r"(?<!\w)(?:left|right|bilateral|small|large|mild|moderate|severe|minimal|tiny|new|old|focal|diffuse|multiple|upper|"
    r"middle|lower|anterior|posterior|medial|lateral|solid|calcified|\w+al|\w+ic|\w+ous|\w+ed)$",
    re.IGNORECASE,
)
_JOINS = re.compile(
    r"(?:and|or|nor|with|without|in|of|at|on|to|which|that|is|are|was|were|due|but|may|can|could|will|should|suggest\w*|"
    r"evaluated|within|consistent|compatible|described|observed|seen|detected|noted|as)\b",
    re.IGNORECASE,
)
_MONTH = re.compile(r"(?:jan|febr)uary|march|april|may|june|july|august|(?:septem|octo|novem|decem)ber", re.IGNORECASE)
_STOP = re.compile(r"[.!?](?=\s|$)")
_LABEL = re.compile(r"\w[\w /'-]{0,40}:")

_VALUE = re.compile(r"\w[\w /'-]{0,40}:\s*\S+")  # a label and one word


def unwrapped(text: str) -> str:
    """The text with a line end only between what are different statements."""
    lines = [line.strip() for line in _LINE.split(text)]
    if len(lines) == 1:
        return text
    written = [line for line in lines if line]
    if not written:
        return ""
    as_list, shouted = _is_list(written), not re.search(r"[a-z]", text)
    parts, gap, last = [written[0]], False, _number(written[0])
    for line in lines[lines.index(written[0]) + 1 :]:
        if not line:
            gap = True
            continue
        number = _number(line)
        numbered = number is not None and (number == (last or 0) + 1 or gap or bool(_ENDED.search(parts[-1])))
        last = number if numbered else last
        if numbered or _begins(parts[-1], line, gap) or not _goes_on(parts[-1], line, gap, as_list, shouted):
            parts += ["", line] if gap else [line]
        else:
            parts[-1] = _joined(parts[-1], line)
        gap = False
    return "\n".join(parts)


def _number(line: str) -> int | None:
    match = _NUMBERED.match(line)
    return int(match[1]) if match else None


def _joined(before: str, after: str) -> str:
    if before.endswith("\u00ad"):
        return before[:-1] + after
    return before + after if re.search(r"\w[-\u2010]$", before) else f"{before} {after}"


def _begins(before: str, after: str, gap: bool) -> bool:
    """Whether a line begins anew by what it is: a bullet, a heading, what stands below a heading."""
    if not gap and parts_heading(before, after):
        return False
    if _DASH.match(after) and re.match(r".\s*[a-z]", after):
        return gap or bool(_ENDED.search(before) or _BULLET.match(before))
    if _BULLET.match(after) or (_LABEL.match(after) and _VALUE.fullmatch(before)):
        return True
    if is_heading(before):
        return not _JOINS.match(after)
    if is_heading(after):
        return gap or after[0].isupper() or bool(_ENDED.search(before))
    return begins_section(after) and not _OPEN.search(before)


def _goes_on(before: str, after: str, gap: bool, as_list: bool, shouted: bool) -> bool:
    """Whether a line goes on with the sentence of the one before."""
    word = re.match(r"[^\W\d_]+", after)
    small = not word or after[0].islower() or shouted
    if gap and before.endswith(":") and not _LABEL.match(after):  # a heading above its text
        return True
    if gap:
        unfinished = before.endswith(",") or _OPEN.search(before) or _MODIFIER.search(before)
        return small and not _ENDED.search(before) and bool(unfinished) and not as_list
    if _ENDED.search(before) or _OPEN.search(before) or _MONTH.match(after):
        return True
    if small:
        return not as_list
    if word and (len(word[0]) == 1 or word[0].isupper()):
        whole = not before.endswith(",") and not _MODIFIER.search(before) and _says_something(before)
        return not (as_list or (whole and _says_something(after)))
    return False


def _is_list(lines: list[str]) -> bool:
    """Whether each line is a statement of its own: no full stops, and no line that needs its neighbour."""
    if len(lines) < 2 or any(_STOP.search(line) for line in lines[:-1]) or _STOP.search(lines[-1].rstrip(".")):
        return False
    if any(line.endswith(",") or _OPEN.search(line) for line in lines[:-1]):
        return False
    if any(_JOINS.match(line) for line in lines[1:]):
        return False
    if any(_named(f"{a} {b}") <= _named(b) and _named(a) & _named(b) for a, b in pairwise(lines)):
        return False  # “no calcified / plaques”: two words for one finding
    return all(_says_something(line) for line in lines)


def _says_something(line: str) -> bool:
    text = plain(line)
    labelled = _LABEL.match(line) and not begins_section(line)
    return bool(labelled or _named(line) or lexicon().cues["normal"].search(text))


def _named(line: str) -> set[str]:
    """The kinds of findings that a line names, asserted or not."""
    text = plain(line)
    return {
        entry.name
        for entry in lexicon().entries
        if (not entry.within or entry.within.search(text))
        and any(term.literal in text and term.pattern.search(text) for term in entry.terms)
    }

"""A judge's answer in GREEN's format → a Judgement (METHOD.md §4.1).

Agrees with the published parser on every well-formed answer. What is unambiguous is read however it is
dressed: bold, headings, CRLF, blank lines, numeric labels, counts without full stop, a prompt echoed
back. Whatever leaves a count or a section open is invalid and says why; nothing is ever guessed.
"""

from __future__ import annotations

import re

from mu2llm.records import ERROR_CATEGORIES, Judgement

_MAX_COUNT = 999
_SECTIONS = {
    "significant": "[Clinically Significant Errors]",
    "insignificant": "[Clinically Insignificant Errors]",
    "matched": "[Matched Findings]",
}
_ORDER = ["explanation", *_SECTIONS]
_TITLE = r"(?:clinically[ \t-]+)?(?:in|non[ \t-]?)?significant[ \t]+errors?|match(?:ed|ing)[ \t]+findings?|explanation"
_HEADER = re.compile(
    rf"\[[ \t]*({_TITLE})[ \t]*:?[ \t]*\]?[ \t]*:?"  # in brackets: anywhere
    rf"|^[^\w\[\n]*(?:\d[.)][ \t]*)?({_TITLE})(?:[ \t]*\]?[ \t]*:|[ \t]*\]|[ \t]*$|(?=[ \t]+[-–—]))"  # on a line
    rf"|(?<=\s)({_TITLE})[ \t]*:",  # within a line: only in title case, see _sections
    re.IGNORECASE | re.MULTILINE,
)
_PLACEHOLDER = re.compile(
    r"<[^<>\n]{0,99}(?:number|error|finding)[^<>\n]{0,99}>", re.IGNORECASE
)  # the prompt's own format
_JUDGE_TURN = re.compile(
    r"<\|assistant\|>|<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|\[/INST\]"
)
_OTHER_TURN = re.compile(r"<\|(?:user|system|end|endoftext|im_start|im_end|eot_id|start_header_id)\|>|</?s>|\[INST\]")

_NAMES = {
    letter: re.escape(name).replace(r"\ ", r"\s+").replace("'", "['’]?") for letter, name in ERROR_CATEGORIES.items()
}
_ANY_NAME = "|".join(_NAMES.values())
_FIRST_WORDS = "|".join(sorted({name.split()[0] for name in ERROR_CATEGORIES.values()}))
_LETTERED = re.compile(
    rf"^[^\w(\n]*(?:(?:category|type|error)[ \t]+)?\(?[ \t]*([a-f])[ \t]*[).:]:?(?!\w)"
    rf"|\(([a-f])\)(?=\s*(?:{_FIRST_WORDS}))",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBERED = re.compile(
    rf"^[^\w(\n]*\(([1-6])\)|^[^\w(\n]*([1-6])[).:](?=\s*(?:{_ANY_NAME}))|\(([1-6])\)(?=\s*(?:{_FIRST_WORDS}))",
    re.IGNORECASE | re.MULTILINE,
)
_NAMED = re.compile(rf"^[^\w\n]*(?=({_ANY_NAME}))", re.IGNORECASE | re.MULTILINE)
_STRAY_LABEL = re.compile(r"\([a-z0-9]\)|^[^\w\n]*[a-z][.)]", re.IGNORECASE)
_TAILS = "|".join(re.escape(" ".join(name.split()[-2:])) for name in ERROR_CATEGORIES.values())
_SWALLOWED = re.compile(rf"(?:{_TAILS})\s*:\s*\d", re.IGNORECASE)

_WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_GAP = r"(?:[\s:=,>\"'(\[]|[-–—](?=\s))*"
_LEAD = re.compile(
    rf"{_GAP}(?:(?:count|total|n|number(?:\s+of\s+(?:matched\s+|matching\s+)?(?:errors?|findings?))?)\s*[:=]{_GAP}"
    r"|there\s+(?:are|is|were|was)\s+(?=\d))?",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(\d{1,9})(?:\.0+(?![\d\w]))?"
    r"(?![.,]\d|[\w%/°+]|\s*(?:/|±|[-–—]|to\b|or\b|out\b|of\b|x\b|×)\s*\d|\s*(?:mm|cm|ml|cc|hu|%|percent|x)\b)"
    r"(?P<unit>\s+(?:errors?|findings?|match(?:es|ed)?(?:\s+findings?)?|instances?)\b)?"
    r"[)\]\"']*(?P<stop>\s*(?:[.;:,)]|[-–—]\s)|[ \t]*\n|\s*\Z)?",
    re.IGNORECASE,
)
_SPELLED = re.compile(
    rf"({'|'.join(_WORDS)})(?:\s*\((\d+)\))?(?:\s+(?:errors?|findings?|match(?:es|ed)?(?:\s+findings?)?))?\s*(?:[.;:]|\n|\Z)",
    re.IGNORECASE,
)
_NOTHING = re.compile(
    r"(?:there\s+(?:are|were|is)\s+)?(?:none|nil|zero|no|n/a|not\s+applicable)\b"
    r"(?:\s+(?:other|additional|such|clinically|significant|insignificant|matched|matching|errors?|findings?|"
    r"discrepanc(?:y|ies)|differences?|issues?|of|this|type|in|category|the|were|was|are|is|have|been|could|be|found|"
    r"noted|identified|detected|observed|reported|seen|made|applicable|present))*\s*(?:[.;!)]+\s*|\n\s*|\Z)",
    re.IGNORECASE,
)
_BUT = re.compile(r"\b(?:but|however|except|although|though)\b", re.IGNORECASE)
_THINKING = re.compile(r"<(/?)(?:think(?:ing)?|thoughts?|reasoning|reflection)>|\[(/?)THINK\]", re.IGNORECASE)
_REFUSAL = re.compile(
    r"please provide|not provided|is (?:incomplete|missing|empty)|cannot|can't|unable|sorry", re.IGNORECASE
)


class Unreadable(Exception):
    """Why an answer, or a part of it, is no judgement."""


def parse(text: str) -> Judgement:
    """A judge's answer → its Judgement; an incomplete or ambiguous one is invalid with the reason in `why`."""
    try:
        readings = [_read(sections) for sections in _answers(_plain(spoken(text)))]
    except Unreadable as error:
        return Judgement(valid=False, score=None, why=str(error))
    if len({(r.significant, r.insignificant, r.matched) for r in readings}) > 1:
        return Judgement(valid=False, score=None, why="there are several answers and they differ")
    return readings[0]


def score(matched: int, significant: tuple[int, ...]) -> float:
    """GREEN = matched / (matched + Σ significant errors), 0 where nothing matched (METHOD.md §4.1)."""
    return matched / (matched + sum(significant)) if matched else 0.0


def spoken(text: str) -> str:
    """Without what the judge thought before it answered: a draft in a block of thoughts is no answer.

    A block whose beginning stood in the prompt is one too. What comes before an unclosed block is kept.
    """
    spoken, start, depth = [""], 0, 0
    for mark in _THINKING.finditer(text):
        if not (mark[1] or mark[2]):
            spoken += [text[start : mark.start()]] if not depth else []
            depth += 1
        else:
            spoken = spoken if depth else [""]
            depth = max(0, depth - 1)
        start = mark.end()
    if depth and not "".join(spoken).strip():
        raise Unreadable("the answer is cut off within the judge's thoughts; raise judge.max_new_tokens")
    return "".join(spoken) + ("" if depth else text[start:])


def _plain(text: str) -> str:
    """Without what only dresses: markdown, HTML, control characters, kinds of line ends and spaces."""
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair is no character
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("：", ":")
    if "\n" not in text:
        text = text.replace("\\n", "\n")
    text = re.sub(r"<br\s*/?>|</p>|</li>|</div>", "\n", text, flags=re.IGNORECASE)
    text = re.sub(r"</?(?:b|strong|i|em|u|p|ul|ol|li|div|span|h\d)>", "", text, flags=re.IGNORECASE)
    text = re.sub(
        r"[\u200b-\u200f\u2060\ufeff\x00-\x08\x0e-\x1f\x7f]|\*+|`+|__|~~|^[ \t]*#+", "", text, flags=re.MULTILINE
    )
    text = re.sub(r"^[ \t]*\|(.*)\|[ \t]*$", lambda row: row[1].replace("|", " "), text, flags=re.MULTILINE)
    return re.sub(r"\n(?: ?\n)+", "\n\n", re.sub(r"[^\S\n]+", " ", text))


def _answers(text: str) -> list[dict[str, str]]:
    """The complete answers in a text: each a dict of section → body."""
    if not text.strip():
        raise Unreadable("the answer is empty")
    first, *turns = _JUDGE_TURN.split(text)
    lacking = set(_SECTIONS)
    for turn in [*turns, first]:
        groups = _groups(_OTHER_TURN.split(turn)[0] if turn is not first else _before_turns(turn))
        complete = [group for group in groups if _SECTIONS.keys() <= group.keys()]
        if complete:
            return complete
        for group in groups:
            lacking = min(lacking, _SECTIONS.keys() - group.keys(), key=len)
    if len(lacking) == len(_SECTIONS) and (refusal := _REFUSAL.search(text)):
        raise Unreadable(f"the judge refused: {_sentence_around(text, refusal.start())}")
    raise Unreadable("the answer lacks " + ", ".join(_SECTIONS[name] for name in _SECTIONS if name in lacking))


def _before_turns(text: str) -> str:
    """What the judge wrote where nothing marks its turn: up to a turn that it made up itself."""
    return next((part for part in _OTHER_TURN.split(text) if part.strip()), "")


def _groups(text: str) -> list[dict[str, str]]:
    """Sections by header, grouped into answers; the format of an echoed prompt, and all before it, is left out."""
    sections = _sections(text)
    kinds = [kind for kind, _ in sections]
    repeated = len(set(kinds)) < len(kinds)
    groups: list[dict[str, str]] = []
    last = len(_ORDER)
    for kind, body in sections:
        place = _ORDER.index(kind)
        if not groups or kind in groups[-1] or (repeated and place < last):
            groups.append({})
        groups[-1][kind] = body
        last = place
    templates = [i for i, group in enumerate(groups) if any(_PLACEHOLDER.search(body) for body in group.values())]
    return groups[templates[-1] + 1 :] if templates else groups


def _sections(text: str) -> list[tuple[str, str]]:
    headers = [m for m in _HEADER.finditer(text) if not m[3] or m[3].istitle()]
    ends = [*(m.start() for m in headers[1:]), len(text)]
    return [(_kind(m), text[m.end() : end]) for m, end in zip(headers, ends, strict=False)]


def _kind(header: re.Match[str]) -> str:
    title = (header[1] or header[2] or header[3]).lower()
    if title.startswith("match"):
        return "matched"
    if title.startswith("expl"):
        return "explanation"
    return "insignificant" if re.search(r"\b(?:in|non[ \t-]?)significant", title) else "significant"


def _read(sections: dict[str, str]) -> Judgement:
    significant, significant_sentences = _errors(sections["significant"], _SECTIONS["significant"])
    insignificant, insignificant_sentences = _errors(sections["insignificant"], _SECTIONS["insignificant"])
    matched, rest = _count(sections["matched"], _SECTIONS["matched"])
    return Judgement(
        valid=True,
        score=score(matched, significant),
        significant=significant,
        insignificant=insignificant,
        matched=matched,
        significant_sentences=significant_sentences,
        insignificant_sentences=insignificant_sentences,
        matched_sentences=_sentences(re.split(r"\n\s*\n", rest.strip(), maxsplit=1)[0]) if matched else (),
    )


def _errors(body: str, section: str) -> tuple[tuple[int, int, int, int, int, int], tuple[tuple[str, ...], ...]]:
    """One error section → counts of (a)–(f) and their sentences."""
    before, items = _items(body)
    if not items:
        unsaid = not before.strip() and section == _SECTIONS["insignificant"]  # no score hangs on it
        if unsaid or _is_nothing(before) or re.fullmatch(r"\s*0\s*\.?\s*", before):
            return (0,) * 6, ((),) * 6  # type: ignore[return-value]
        raise Unreadable(f"{section}: {'is empty' if not before.strip() else 'neither counts nor “none”'}")
    if _has_stray_count(before):
        raise Unreadable(f"{section}: a line is none of (a)–(f)")
    counts: list[int] = [0] * 6
    sentences: list[tuple[str, ...]] = [()] * 6
    seen: dict[int, str] = {}
    for index, item in items:
        if seen.setdefault(index, item.strip()) != item.strip():
            raise Unreadable(f"{section}: ({'abcdef'[index]}) is counted twice")
        counts[index], rest = _count(_after_name(item), f"{section} ({'abcdef'[index]})")
        if _SWALLOWED.search(rest):
            raise Unreadable(f"{section}: there is another count within ({'abcdef'[index]})")
        sentences[index] = _sentences(rest) if counts[index] else ()
    return tuple(counts), tuple(sentences)  # type: ignore[return-value]


def _items(body: str) -> tuple[str, list[tuple[int, str]]]:
    """An error section → what stands before its first item, and (category index, text behind the label)."""
    for pattern, labels in ((_LETTERED, "abcdef"), (_NUMBERED, "123456")):
        matches = list(pattern.finditer(body))
        if matches:
            indices = [labels.index(next(group for group in m.groups() if group).lower()) for m in matches]
            break
    else:
        matches = list(_NAMED.finditer(body))
        indices = [
            next(i for i, name in enumerate(_NAMES.values()) if re.match(name, m[1], re.IGNORECASE)) for m in matches
        ]
    if not matches:
        return body, []
    ends = [*(m.start() for m in matches[1:]), len(body)]
    return body[: matches[0].start()], [
        (index, body[m.end() : end]) for index, m, end in zip(indices, matches, ends, strict=True)
    ]


def _after_name(item: str) -> str:
    """What follows the name of an error type, as it should be or as the judge worded it."""
    named = re.match(rf"\s*(?:{_ANY_NAME})", item, re.IGNORECASE) or re.match(r"[^:\d\n]{0,120}(?=:)", item)
    return item[named.end() :] if named else item


def _count(text: str, where: str) -> tuple[int, str]:
    """The whole number at the beginning of a text and what follows it."""
    start = _LEAD.match(text).end()  # type: ignore[union-attr]
    given = " ".join(text[start : start + 40].split())
    spelled = _SPELLED.match(text, start)
    if spelled and spelled[2] in (None, str(_WORDS[spelled[1].lower()])):
        return _WORDS[spelled[1].lower()], text[spelled.end() :]
    if _is_nothing(text[start:]):
        return 0, ""
    number = _NUMBER.match(text, start)
    if not number:
        raise Unreadable(f"{where}: " + (f"no whole number in {given!r}" if given else "cut off before its count"))
    count, rest = int(number[1]), text[number.end() :]
    if count > _MAX_COUNT or (count == 1 and re.search(r"^\s*2[.)]\s", rest, re.MULTILINE)):
        raise Unreadable(f"{where}: no plausible count in {given!r}")
    delimited = number["stop"] is not None or number["unit"] or not rest.lstrip()[:1].islower()
    if not delimited and len(_sentences(rest)) != count:
        raise Unreadable(f"{where}: {given!r} may be a count or a sentence")
    return count, rest


def _is_nothing(text: str) -> bool:
    """Whether a text says “none”, and nothing that takes it back."""
    found = _NOTHING.match(text.strip())
    return bool(found) and not _BUT.search(text) and not _has_stray_count(text)


def _has_stray_count(text: str) -> bool:
    """Whether a line that is no item looks like one: a colon and a number, or a label and a number behind it."""
    return any(
        re.search(r":\s*\d", line) or ((label := _STRAY_LABEL.search(line)) and re.search(r"\d", line[label.end() :]))
        for line in text.split("\n")
    )


def _sentences(text: str) -> tuple[str, ...]:
    parts = (" ".join(part.split()).rstrip(". ") for part in re.split(r";|\n\s*[-•]", text))
    return tuple(part for part in parts if part)


def _sentence_around(text: str, position: int) -> str:
    start = max(text.rfind(".", 0, position), text.rfind("\n", 0, position)) + 1
    return " ".join(text[start : start + 200].split())

"""FLARE 2026, multimodal model for 3-D CT: lists of `{case_id, findings, global_vqa, local_vqa}`.

`train/CT-AMOS-Tr.json` and `train/CT-RATE-Tr.json` with their scans in `CT-AMOS-1290` and `CT-RATE-2000`, and
`validation/val.json` with `images`. Findings are by region, of which there are more than AMOS-MM has. The data are not
here to be read: the layout is that of the data set's page and of the challenge's own programs (medfm-flare).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mu2llm import storage
from mu2llm.cases.rows import clean, read_json, unused
from mu2llm.cases.table import CaseTable
from mu2llm.cases.volumes import Volumes, stem
from mu2llm.errors import UserError
from mu2llm.records import Case, Question, Split
from mu2llm.settings.data import DataConfig

LISTS: dict[str, Split] = {"ct-amos-tr": "train", "ct-rate-tr": "train", "val": "validation"}
USED = ("case_id", "findings", "global_vqa", "local_vqa")
_OF_CT_RATE = re.compile(r"((?:train|valid)_\d+)_[a-z]+_\d+")
_ROOT = -1  # the `follow_up` of a question that follows none


def cases(manifest: str, found: Volumes, data: DataConfig, table: CaseTable) -> Iterator[Case]:
    """`manifest` is one of the lists, or the folder that they lie in or below.

    The report is the findings of all regions; each region's are also a question, and so are the multiple-choice ones: a
    local one together with those that follow it.
    """
    for uri, split in _lists(manifest, table).items():
        document = read_json(uri)
        if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
            raise UserError(f"manifest {uri} is not FLARE's: expected a JSON list of objects with case_id and findings")
        table.counts["rows"] = table.counts.get("rows", 0) + len(document)
        table.note("unknown_columns", unused(document, USED))
        for place, entry in enumerate(document, 1):
            name = str(entry.get("case_id") or f"{uri} entry {place}")
            try:
                yield _case(entry, split, found)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                table.reject(uri, "invalid_row", f"entry {place}: {error!r}", stem(name))


def _lists(manifest: str, table: CaseTable) -> dict[str, Split]:
    """The lists by URI; other JSON files are noted."""
    if storage.is_file(manifest):
        uris = [manifest]
    else:
        names = storage.files_below(manifest)
        uris = [storage.join(manifest, name) for name in names if name.lower().endswith(".json")]
    known = {uri: LISTS.get(stem(uri).lower().removesuffix(".json").strip()) for uri in uris}
    found = {uri: split for uri, split in known.items() if split}
    if not found:
        raise UserError(f"manifest {manifest}: expected FLARE's CT-AMOS-Tr.json, CT-RATE-Tr.json or val.json")
    table.note("unknown_files", [uri for uri in uris if uri not in found])
    return found


def _case(entry: dict[str, Any], split: Split, found: Volumes) -> Case:
    name = str(entry["case_id"])
    identity = stem(name)
    regions = {region: clean(str(text or "")) for region, text in (entry.get("findings") or {}).items()}
    present = {region: text for region, text in regions.items() if text}
    by_region = [
        Question(question=f"Describe the findings in the {region}.", answer=text, region=region)
        for region, text in present.items()
    ]
    of_ct_rate = _OF_CT_RATE.fullmatch(identity)
    return Case(
        id=identity,
        patient=of_ct_rate[1] if of_ct_rate else identity,
        volume=found.scan(name if name != identity else f"{name}.nii.gz", least=1),
        report=" ".join(f"{region[:1].upper()}{region[1:]}: {text}" for region, text in present.items()),
        split=split,
        questions=(*by_region, *_asked(entry.get("global_vqa") or []), *_chains(entry.get("local_vqa") or [])),
        source="FLARE26-MLLM-3D (CC BY-NC 4.0)",
    )


def _asked(questions: list[dict[str, Any]]) -> list[Question]:
    return [Question(question=_text(each), answer=_answer(each)) for each in questions]


def _chains(questions: list[dict[str, Any]]) -> list[Question]:
    """Each question that follows none, with all that follow it in a numbered list."""
    above = {each["id"]: each["follow_up"] for each in questions}
    chains: dict[Any, list[dict[str, Any]]] = {each["id"]: [] for each in questions if each["follow_up"] == _ROOT}
    for each in sorted(questions, key=lambda each: (each["follow_up"] != _ROOT, each["id"])):
        root, seen = each["id"], set()
        while above[root] != _ROOT and root not in seen:
            seen.add(root)
            root = above[root]
        chains[root].append(each)
    return [
        Question(
            question="\n".join(f"{number}. {_text(each)}" for number, each in enumerate(chain, 1)),
            answer="\n".join(f"{number}. {_answer(each)}" for number, each in enumerate(chain, 1)),
        )
        for chain in chains.values()
    ]


def _text(question: dict[str, Any]) -> str:
    choices = question.get("choices")
    asked = str(question["question"]).strip()
    return f"{asked} Choices: {', '.join(str(choice) for choice in choices)}." if choices else asked


def _answer(question: dict[str, Any]) -> str:
    answer = question["answer"]
    return ", ".join(str(each) for each in answer) or "None" if isinstance(answer, list) else str(answer)

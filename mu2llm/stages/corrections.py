"""Radiologists' corrections, as the service stores them: JSON lines → preference pairs, without a judge.

A pair is about a scan of the shards, or, where they do not have it, about the input that the service kept beside the
correction (`serving.keep_inputs`): DPO reads those as further scans.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mu2llm import artefacts, storage
from mu2llm.cases import Shards, dataset
from mu2llm.cases.shards import write_scans
from mu2llm.ct import input_key
from mu2llm.engine import kept_inputs
from mu2llm.errors import UserError
from mu2llm.records import Case, Correction, PreferencePair, PreprocessSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corrected:
    """What corrections give: pairs, how many are none and why, and the cases of kept inputs that pairs are about."""

    pairs: list[PreferencePair]
    unused: Counter[str]
    cases: list[Case]

    def write(self, uri: str, split: str, spec: PreprocessSpec) -> str:
        """The kept inputs as shards at the URI, in place of what was there; where they lie, "" where there are none."""
        storage.delete(uri)
        if not self.cases:
            return ""
        return storage.lasting(write_scans(uri, split, map(_row, self.cases), self.cases, spec).uri)


def read_corrections(uri: str) -> list[Correction]:
    """Those in a file of JSON lines, or in all `.jsonl` files of a folder; a UserError names a wrong line."""
    folder = not storage.is_file(uri)
    names = [each.base_name for each in storage.list_files(uri, recursive=False)] if folder else []
    files = [storage.join(uri, name) for name in names if name.endswith(".jsonl")] if folder else [uri]
    if not files:
        raise UserError(f"{uri} holds no corrections: give a file of JSON lines, or a folder of such files")
    found = []
    for file in files:
        # not splitlines: a text may hold U+2028 and other ends of lines that JSON does not escape
        for number, line in enumerate(storage.read_bytes(file).decode("utf-8-sig").split("\n"), start=1):
            try:
                found += [Correction.model_validate_json(line)] if line.strip() else []
            except ValueError as error:
                why = str(error).splitlines()[0]
                raise UserError(f"{file}, line {number}: not a correction: {why}") from None
    return found


def find_inputs(uri: str, corrections: Sequence[Correction]) -> dict[str, str]:
    """Correction → URI of the input that was kept for it, in the folder that the corrections were read from."""
    folder = storage.parent(uri) if storage.is_file(uri) else uri
    there = storage.list_files(storage.join(folder, kept_inputs.FOLDER), recursive=False)
    names = {info.base_name.removesuffix(".parquet") for info in there}
    return {each.id: kept_inputs.place(folder, each.report_id) for each in corrections if each.report_id in names}


def digest(corrections: Sequence[Correction], inputs: Mapping[str, str]) -> str:
    """Digest of the corrections, and of the inputs that are kept for them."""
    keys = sorted({each.input_key for each in corrections if each.id in inputs})
    return artefacts.digest([*(each.row() for each in corrections), *keys])


def correct(corrections: Sequence[Correction], inputs: Mapping[str, str], shards: Shards, split: str) -> Corrected:
    """The pairs about scans of the shards' split, and about kept `inputs` of scans that no split has."""
    case_of = case_of_scan(corrections, shards, split)
    left = [each for each in corrections if each.id in inputs.keys() - case_of.keys() and not each.accepted]
    kept, why = _kept(left, inputs, shards, split)
    pairs, unused = correction_pairs(corrections, case_of | {id: case.id for id, case in kept.items()}, why)
    cases, used = {case.id: case for case in kept.values()}, {pair.case_id for pair in pairs}
    return Corrected(pairs, unused, [case for case in cases.values() if case.id in used])


def case_of_scan(corrections: Sequence[Correction], shards: Shards, split: str) -> dict[str, str]:
    """Correction → case of the split: by the scan's URI, else (an upload, a copy) by what the model saw of it."""
    by_volume = {storage.absolute(case.volume): case.id for case in shards.cases(split)}
    volumes = {each.id: storage.absolute(each.volume) for each in corrections if each.volume}
    found = {id: by_volume[volume] for id, volume in volumes.items() if volume in by_volume}
    left = [each for each in corrections if each.id not in found and each.spec_hash == shards.spec.hash]
    if any(each.input_key for each in left) and shards.count(split):
        by_key = input_keys(shards, split)
        found |= {each.id: by_key[each.input_key] for each in left if each.input_key in by_key}
    return found


def input_keys(shards: Shards, split: str) -> dict[str, str]:
    """What the model sees of each scan of a split, by its key → the case. Reads all voxels, on Ray Data."""

    def keys(batch: dict[str, Any]) -> dict[str, Any]:
        scans = zip(batch["voxels"], batch["chunk_mask"], strict=True)
        return {"id": batch["id"], "key": [input_key(*scan) for scan in scans]}

    rows = dataset(shards, split, ["id", "voxels", "chunk_mask"]).map_batches(keys, batch_size=8)
    return {row["key"]: row["id"] for row in rows.iter_rows()}


def correction_pairs(
    corrections: Sequence[Correction], case_of: Mapping[str, str], why: Mapping[str, str] | None = None
) -> tuple[list[PreferencePair], Counter[str]]:
    """What was corrected in reports of the cases' scans, the edited report preferred, and why others are no pairs:
    of those without a case as `why` says."""
    pairs: list[PreferencePair] = []
    unused: Counter[str] = Counter()
    for correction in corrections:
        case_id = case_of.get(correction.id)
        chosen, rejected = (" ".join(text.split()) for text in (correction.chosen, correction.rejected))
        if correction.accepted:
            unused["report_accepted_as_it_is"] += 1
        elif case_id is None:
            unused[(why or {}).get(correction.id, "correction_of_a_scan_not_in_the_split")] += 1
        elif chosen == rejected or not chosen or not rejected:
            unused["correction_without_a_change"] += 1
        else:
            pairs.append(
                PreferencePair(
                    case_id=case_id,
                    prompt=correction.question,
                    chosen=correction.chosen,
                    rejected=correction.rejected,
                    chosen_score=None,
                    rejected_score=None,
                    judge="human",
                    origin="human",
                )
            )
    return pairs, unused


def _kept(
    corrections: Sequence[Correction], inputs: Mapping[str, str], shards: Shards, split: str
) -> tuple[dict[str, Case], dict[str, str]]:
    """Correction → case of its kept input, and why others have none. What is trained on is of no other split."""
    others = [name for name in shards.index.splits if name != split] if corrections else []
    elsewhere = {id for other in others for id in case_of_scan(corrections, shards, other)}
    cases: dict[str, Case] = {}
    why: dict[str, str] = {}
    for each in corrections:
        uri = inputs[each.id]
        reason = "correction_of_a_scan_of_another_split" if each.id in elsewhere else _unfit(uri, each, shards.spec)
        if reason:
            why[each.id] = reason
            continue
        name = f"corrected-{each.input_key}"  # of its content, which so decides what is trained on it
        values = {"volume": storage.lasting(uri), "report": each.chosen, "split": split, "source": "correction"}
        cases[each.id] = Case(id=name, patient=name, **values)
    return cases, why


def _unfit(uri: str, correction: Correction, spec: PreprocessSpec) -> str | None:
    """Why a kept input cannot stand beside shards of a spec."""
    try:
        kept = kept_inputs.parse(storage.read_bytes(uri))
    except ValueError as error:
        logger.warning("%s is left out: it is no kept input (%s)", uri, error)
        return "kept_input_unreadable"
    if {kept.spec_hash, correction.spec_hash} != {spec.hash}:
        logger.warning("%s is left out: its spec is %s, that of the shards %s", uri, kept.spec_hash, spec.title)
        return "kept_input_of_another_spec"
    same = kept.voxels.shape == spec.shape and kept.voxels.dtype == spec.dtype
    if not same or input_key(kept.voxels, kept.chunk_mask) != correction.input_key:
        logger.warning("%s is left out: it is not what the model saw when it wrote the report", uri)
        return "kept_input_unreadable"
    return None


def _row(case: Case) -> dict[str, Any]:
    """A batch of one row."""
    kept = kept_inputs.parse(storage.read_bytes(case.volume))
    of_case = {"id": [case.id], "report": [case.report], "questions": ["[]"]}
    return {**of_case, "voxels": kept.voxels[None], "chunk_mask": kept.chunk_mask[None]}

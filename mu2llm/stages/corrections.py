"""Radiologists' corrections, as the service stores them: JSON lines that become preference pairs."""

from __future__ import annotations

from mu2llm import storage
from mu2llm.errors import UserError
from mu2llm.records import Correction


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

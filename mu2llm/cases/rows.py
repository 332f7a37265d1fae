"""Tables and texts as manifests have them: CSV, JSON lines, Parquet → rows; report texts set right."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from mu2llm import storage
from mu2llm.cases.names import is_nothing
from mu2llm.cases.table import CaseTable
from mu2llm.errors import UserError

READERS = 16  # small files read at once
DELIMITERS = ",;\t|"


def read_text(uri: str, table: CaseTable) -> str:
    """A text file, with or without a byte order mark; what is not UTF-8 is read as Windows-1252, and noted."""
    raw = storage.read_bytes(uri)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16", errors="replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        table.note("decoded_as_latin", [uri])
        return raw.decode("cp1252", errors="replace")


def read_texts(uris: list[str], table: CaseTable) -> list[str | None]:
    """Many small text files, read in parallel; None for one that is not there."""

    def read(uri: str) -> str | None:
        try:
            return read_text(uri, table)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, uris))


def read_csv(uri: str, table: CaseTable) -> list[dict[str, str]]:
    """Rows of a CSV file, also with line breaks in fields; cells that are missing are empty.

    Fields are parted by what parts the header: commas, semicolons, tabs or bars. Rows without any value are noted and
    left out; cells beyond the header are noted.
    """
    csv.field_size_limit(2**24)
    text = read_text(uri, table).lstrip("\ufeff\r\n")
    if marked := re.match(r"sep=(.)\r?\n", text):  # Excel's own mark
        text = text[marked.end() :]
    header = text.split("\n", 1)[0]
    delimiter = (
        marked[1] if marked else max(DELIMITERS, key=lambda each: len(next(csv.reader([header], delimiter=each), ())))
    )
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="", delimiter=delimiter, skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    rows = []
    for number, row in enumerate(reader, 1):
        if any(cell.strip() for cell in row.pop(None, ())):  # type: ignore[call-overload]
            table.note("extra_cells", [f"row {number}"])
        if any(value.strip() for value in row.values()):
            rows.append({name: value for name, value in row.items() if name})
        else:
            table.note("blank_row", [f"row {number}"])
    return rows


def read_json_lines(uri: str, table: CaseTable) -> list[dict[str, Any]]:
    """One JSON object a line; a line that is none becomes an empty row."""
    lines = read_text(uri, table).split("\n")  # not splitlines: texts may hold other separators
    return [_object(line) for line in lines if line.strip()]


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def read_parquet(uri: str, table: CaseTable) -> list[dict[str, Any]]:
    """Rows of a Parquet file, those without any value left out and noted; a UserError where it is none."""
    try:
        rows: list[dict[str, Any]] = storage.read_table(uri).to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"manifest {uri} is not Parquet: {str(error).splitlines()[0]}") from None
    blank = [number for number, row in enumerate(rows, 1) if all(is_nothing(value) for value in row.values())]
    table.note("blank_row", [f"row {number}" for number in blank])
    return [row for number, row in enumerate(rows, 1) if number not in set(blank)]


def read_json(uri: str) -> Any:
    """A JSON document; a UserError where it is none."""
    try:
        return json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise UserError(f"manifest {uri} is not JSON: {error}") from None


def read_folder(manifest: str, table: CaseTable) -> dict[str, list[dict[str, str]]]:
    """A CSV file, or all CSV files below a folder → rows by URI; those without any are left out."""
    if storage.is_file(manifest):
        uris = [manifest]
    else:
        names = storage.files_below(manifest)
        uris = [storage.join(manifest, name) for name in names if name.lower().endswith(".csv")]
    tables = {uri: read_csv(uri, table) for uri in uris}
    return {uri: rows for uri, rows in tables.items() if rows}


def number(text: Any) -> float | None:
    """A cell as a finite number; None where it is none."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def clean(text: str | None) -> str:
    """Text with single spaces; what only says that there is none becomes empty."""
    joined = " ".join((text or "").split())
    return "" if is_nothing(joined) else joined


def compose(findings: str | None, impression: str | None) -> str:
    """One report of its two parts. CT-RATE joins some by a stray quotation mark: they are parted there."""
    first, second = clean(findings), clean(impression)
    if not second and first.count('"') == 1 and re.search(r'(?:^|\s)"(?:\s|$)', first):
        first, second = (part.strip() for part in first.split('"'))
    parts = [f"{name}: {text}" for name, text in (("Findings", first), ("Impression", second)) if text]
    return " ".join(parts)


def unused(rows: Iterable[dict[str, Any]], used: Iterable[str]) -> list[str]:
    """The columns of rows that are not among those used, in their order."""
    seen: dict[str, None] = {}
    for row in rows:
        seen.update(dict.fromkeys(row))
    return [name for name in seen if name not in set(used)]

"""Corrections as they lie in storage."""

from __future__ import annotations

import pytest

from mu2llm.errors import UserError
from mu2llm.records import Correction
from mu2llm.stages.corrections import read_corrections

CORRECTION = Correction(
    id="c",
    scan_sha256="ab",
    volume="s3://b/a.nii.gz",
    question="Write.",
    chosen="No nodule.",
    rejected="A nodule.",
    time="2026-01-01T00:00:00+00:00",
)


def test_corrections_are_read_from_a_file_or_a_folder_of_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(CORRECTION.model_copy(update={"id": name}).model_dump_json() + "\n")
    assert [each.id for each in read_corrections(str(tmp_path))] == ["a", "b"]
    assert read_corrections(str(tmp_path / "b.jsonl"))[0].chosen == "No nodule."


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085", "\x0b", "\r", "\x1c"])
def test_ends_of_lines_within_a_text_are_its_own(tmp_path, end):
    """One such correction made all unreadable."""
    odd = CORRECTION.model_copy(update={"id": "odd", "chosen": f"Small effusion.{end}Impression: effusion."})
    (tmp_path / "a.jsonl").write_text(f"{odd.model_dump_json()}\n{CORRECTION.model_dump_json()}\n", encoding="utf-8")
    assert read_corrections(str(tmp_path / "a.jsonl")) == [odd, CORRECTION]


def test_a_line_that_is_no_correction_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(CORRECTION.model_dump_json() + "\n{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
        read_corrections(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="holds no corrections"):
        read_corrections(str(tmp_path / "nowhere"))

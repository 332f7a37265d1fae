"""Our own manifest: what becomes a case, what is counted and listed, and what ends in a UserError."""

import csv
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_scans as scans
from hypothesis import given, settings
from hypothesis import strategies as st

from mu2llm import cases
from mu2llm.cases.table import CaseTable, assign_splits
from mu2llm.errors import UserError
from mu2llm.records import Case

DATA = scans.experiment().data
FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def read(folder, name="manifest.jsonl", format="jsonl", **kwargs):
    return cases.read_manifest(str(folder / name), format, str(folder), DATA, **kwargs)


def test_the_three_forms_give_the_same_cases(tmp_path):
    rows = scans.write(tmp_path, 4)
    flat = [{name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows]
    with (tmp_path / "manifest.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "manifest.parquet")
    first, second, third = (
        [case.model_copy(update={"source": ""}) for case in read(tmp_path, f"manifest.{form}", form).cases]
        for form in ("jsonl", "csv", "parquet")
    )
    assert first == second == third
    assert first[1].volume == f"{tmp_path}/volumes/case-001.nii.gz"
    assert first[1].findings[0].side == "left" and first[1].questions[0].answer == "nodule 1"


def test_everything_wrong_is_counted_and_listed(tmp_path):
    rows = scans.write(tmp_path, 10)
    (tmp_path / rows[3]["volume"]).unlink()
    rows[4]["report"] = " "
    rows[5]["colour"] = "blue"
    rows[6]["findings"] = [{"name": "nodule", "side": "middle"}]
    del rows[7]["volume"]
    lines = [json.dumps(row) for row in (*rows, rows[0])] + ["{broken"]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    table = read(tmp_path)
    assert [case.id for case in table.cases] == [f"case-00{n}" for n in (0, 1, 2, 5, 8, 9)]
    assert table.listed == {
        "unknown_columns": ["colour"],
        "invalid_row": ["case-006", "case-007", "row 12"],
        "duplicate_id": ["case-000"],
        "not_found": ["case-003"],
        "no_report": ["case-004"],
        "scan_without_row": ["volumes/case-006.nii.gz", "volumes/case-007.nii.gz"],
    } | {"scan_without_row": table.listed["scan_without_row"]}
    assert table.listed["scan_without_row"][-1] == "volumes/case-007.nii.gz"
    assert table.counts["rows"] == 12 and table.counts["cases"] == 6
    assert sorted(r.reason for r in table.rejections) == [
        "duplicate_id",
        "invalid_row",
        "invalid_row",
        "invalid_row",
        "not_found",
    ]
    assert "side" in next(r.message for r in table.rejections if r.case_id == "case-006")
    assert set(table.counts) <= set(cases.NOTES)


def test_texts_may_hold_any_separator_and_splits_go_by_their_usual_names(tmp_path):
    rows = scans.write(tmp_path, 3)
    rows[0] |= {"report": "first\u2028second\x85third", "split": "val"}
    rows[1] |= {"split": "Training"}
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines), "utf-8")
    table = read(tmp_path)
    assert table.cases[0].report == "first\u2028second\x85third"
    assert [case.split for case in table.cases[:2]] == ["validation", "train"]


def test_without_need_for_reports_scans_without_stay(tmp_path):
    rows = scans.write(tmp_path, 3)
    del rows[1]["report"]
    scans.write_manifest(tmp_path / "manifest.jsonl", rows)
    assert len(read(tmp_path).cases) == 2
    assert len(read(tmp_path, need_report=False).cases) == 3


def test_volumes_may_be_uris_folders_or_elsewhere(tmp_path):
    rows = scans.write(tmp_path / "here", 3)
    scans.save(tmp_path / "there" / "x.nii.gz", 9)
    rows[0]["volume"] = f"{tmp_path}/there/x.nii.gz"
    rows[1]["volume"] = "../there/x.nii.gz"
    (tmp_path / "here" / "series").mkdir()
    for number in range(2):
        (tmp_path / "here" / "series" / f"{number}.dcm").write_bytes(b"x")
        (tmp_path / "here" / "unused").mkdir(exist_ok=True)
        (tmp_path / "here" / "unused" / f"{number}.dcm").write_bytes(b"x")
    rows[2]["volume"] = "series"
    scans.write_manifest(tmp_path / "here" / "manifest.jsonl", rows)
    table = read(tmp_path / "here")
    assert len(table.cases) == 3 and not table.rejections
    assert "unused" in table.listed["scan_without_row"] and "series" not in table.listed["scan_without_row"]


@pytest.mark.parametrize(
    ("name", "format", "content", "says"),
    [
        ("manifest.jsonl", "dicom", "", "there are jsonl"),
        ("absent.jsonl", "jsonl", "", "is not there"),
        ("manifest.parquet", "parquet", "id,volume", "not Parquet"),
        ("manifest.json", "amos-mm", "{", "not JSON"),
        ("manifest.json", "m3d-cap", "[]", "not M3D-Cap"),
        ("manifest.csv", "ct-rate", "id,volume\n1,2\n", "no CT-RATE table"),
        ("manifest.csv", "csv", "name\nx\n", "invalid_row 1"),
        ("manifest.jsonl", "jsonl", "\n", "no case"),
        ("manifest.jsonl", "jsonl", '{"id": "a", "volume": "a.nii", "report": "r"}', "not_found 1"),
    ],
)
def test_what_cannot_be_a_manifest_is_a_user_error(tmp_path, name, format, content, says):
    if not name.startswith("absent"):
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        read(tmp_path, name, format)


def test_text_that_is_not_utf8_is_read_and_noted(tmp_path):
    scans.write(tmp_path, 1)
    header = b"id,volume,report\n"
    (tmp_path / "manifest.csv").write_bytes(header + b'a,volumes/case-000.nii.gz,"the patient\x92s\nlung"\n')
    table = read(tmp_path, "manifest.csv", "csv")
    assert table.cases[0].report == "the patient’s\nlung"
    assert table.counts["decoded_as_latin"] == 1


def case(patient: str, number: int, split=None) -> Case:
    return Case(id=f"{patient}-{number}", patient=patient, volume="v", report="r", split=split)


def splits(items: list[Case]) -> dict[str, str]:
    table = CaseTable(cases=items)
    assign_splits(table, FRACTIONS)
    return {each.id: each.split for each in table.cases}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text(max_size=4), st.integers(0, 3)), min_size=1, max_size=60, unique=True), st.randoms())
def test_splits_are_by_patient_and_do_not_depend_on_the_order(pairs, rng: random.Random):
    items = [case(patient, number) for patient, number in pairs]
    chosen = splits(items)
    shuffled = list(items)
    rng.shuffle(shuffled)
    assert splits(shuffled) == chosen
    by_patient = {(each.patient, chosen[each.id]) for each in items}
    assert len(by_patient) == len({each.patient for each in items})
    if len(by_patient) >= 3:
        assert set(chosen.values()) == set(FRACTIONS)


def test_more_cases_never_move_a_patient():
    items = [case(f"p{n}", 0) for n in range(400)]
    before, after = splits(items[:300]), splits(items)
    assert all(after[name] == split for name, split in before.items())
    share = list(after.values()).count("train") / 400
    assert 0.74 < share < 0.86


def test_the_data_sets_own_splits_are_kept_for_the_whole_patient():
    chosen = splits([case("a", 0, "test"), case("a", 1), case("b", 0, "train"), case("b", 1, "test")])
    assert chosen == {"a-0": "test", "a-1": "test", "b-0": "train", "b-1": "test"}
    table = CaseTable(cases=[case("b", 0, "train"), case("b", 1, "test")])
    assign_splits(table, FRACTIONS)
    assert table.listed["patient_in_several_splits"] == ["b"]


def test_a_split_that_is_not_wanted_stays_empty():
    table = CaseTable(cases=[case(f"p{n}", 0) for n in range(30)])
    assign_splits(table, {"train": 1.0, "validation": 0.0, "test": 0.0})
    assert {each.split for each in table.cases} == {"train"}

"""Our own manifest: what becomes a case, what is counted and listed, and what ends in a UserError."""

import csv
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_scans as scans
from hypothesis import given, settings
from hypothesis import strategies as st

from mu2llm import cases, storage
from mu2llm.cases import volumes
from mu2llm.cases.table import CaseTable, assign_splits
from mu2llm.cases.volumes import SLICE_BYTES, Listing, Volumes
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


def test_a_rows_slope_and_intercept_stay_also_where_it_names_a_series(tmp_path):
    scans.write(tmp_path, 1)
    row = {"id": "a", "volume": "volumes/case-000.nii.gz", "report": "Clear.", "rescale": [1, -8192], "series": "1.2#2"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    (case,) = read(tmp_path).cases
    assert case.rescale == (1, -8192) and case.series == "1.2#2"


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


def series(root, patients, slices):
    """Folders of small files as an archive exports them: without suffix, named by UID, or .dcm."""
    names = ("IM{}", "1.2.840.{}", "{}.dcm")
    for patient in range(patients):
        folder = root / f"site-{patient % 2}" / f"patient-{patient}" / "ct"
        folder.mkdir(parents=True)
        for number in range(slices):
            (folder / names[patient % 3].format(number)).write_bytes(bytes(10 + number))


def test_of_a_root_of_series_their_folders_are_kept_and_not_their_slices(tmp_path):
    """7.7 million slices were 3.5 GiB in the driver."""
    series(tmp_path, 20, 5)
    (tmp_path / "site-0" / "patient-0" / "ct" / "large").write_bytes(bytes(SLICE_BYTES))
    found = Volumes.below(str(tmp_path))
    assert list(found.files) == ["site-0/patient-0/ct/large"] and len(found.folders) == 2 + 20 + 20
    assert found.facts(f"{tmp_path}/site-1/patient-3").bytes == 10 + 11 + 12 + 13 + 14
    before = found.facts(f"{tmp_path}/site-1/patient-3/ct").stamp
    (tmp_path / "site-1" / "patient-3" / "ct" / "IM2").write_bytes(b"another")
    after = Volumes.below(str(tmp_path))
    assert after.facts(f"{tmp_path}/site-1/patient-3/ct").stamp != before
    assert after.folders["site-0/patient-2"] == found.folders["site-0/patient-2"]
    found.name("site-0/patient-2/ct")
    found.name("site-1/patient-5/ct/3.dcm")
    assert len(found.unnamed()) == 6 - 2 and "site-0/patient-8/ct" in found.unnamed()


def test_a_slice_that_is_a_scan_by_itself_is_asked_for(tmp_path):
    series(tmp_path, 3, 2)
    found = Volumes.below(str(tmp_path))
    one = f"{tmp_path}/site-0/patient-2/ct/1.dcm"
    assert not found.missing(one) and found.facts(one).bytes == 11
    assert found.missing(f"{tmp_path}/site-0/patient-2/ct/9.dcm") and found.missing(f"{tmp_path}/x/1.dcm")


def test_tasks_list_what_one_process_does(tmp_path, monkeypatch):
    series(tmp_path, 9, 3)
    (tmp_path / "site-0" / "note.txt").write_text("n")
    alone = Volumes.below(str(tmp_path))
    monkeypatch.setattr(volumes, "SHARED_FROM", 2)
    monkeypatch.setattr(volumes, "A_TASK", 1)
    monkeypatch.setattr(volumes, "TASKS", 3)
    assert Volumes.below(str(tmp_path)) == alone


@pytest.mark.usefixtures("ray_cluster")
def test_with_a_cluster_the_driver_lists_no_series(tmp_path, monkeypatch):
    series(tmp_path, 20, 2)
    alone = Listing.of(str(tmp_path))
    monkeypatch.setattr(volumes, "SHARED_FROM", 20)
    listed = []
    monkeypatch.setattr(volumes.storage, "files_below", lambda uri: pytest.fail("listed here"))
    monkeypatch.setattr(
        volumes.storage, "list_folder", lambda uri, each=storage.list_folder: [listed.append(uri), each(uri)][1]
    )
    assert Listing.of(str(tmp_path)) == alone and len(listed) == 3


@pytest.mark.parametrize(
    ("name", "format", "content", "says"),
    [
        ("manifest.jsonl", "dicom", "", "there are jsonl"),
        ("absent.jsonl", "jsonl", "", "is not there"),
        ("manifest.parquet", "parquet", "id,volume", "not Parquet"),
        ("manifest.json", "amos-mm", "{", "not JSON"),
        ("manifest.json", "m3d-cap", "[]", "not M3D-Cap"),
        ("manifest.csv", "ct-rate", "id,volume\n1,2\n", "no CT-RATE table"),
        ("manifest.csv", "csv", "name\nx\n", "no column id, volume; it has name"),
        ("manifest.csv", "csv", "id,volume\n,a.nii\n", "invalid_row 1"),
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


def table_of(folder, text: str, names=("a", "b", "c"), format="csv"):
    """The table of a manifest as written, with scans a.nii.gz … beside it."""
    for name in names:
        (folder / f"{name}.nii.gz").write_bytes(b"x")
    (folder / "manifest.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(folder, "manifest.csv", format)


def test_one_person_in_several_spellings_is_one_patient(tmp_path):
    table = table_of(tmp_path, "id,patient,volume,report\n1,p7 ,a.nii.gz,R\n2,p7,b.nii.gz,R\n3\u200b,P7,c.nii.gz,R\n")
    assert [(case.id, case.patient) for case in table.cases] == [("1", "p7"), ("2", "p7"), ("3", "p7")]
    assert len({case.split for case in table.cases}) == 1
    assert table.listed["name_mended"] == ["patient p7", "id 3"] and table.listed["patient_spelling"] == ["P7 (p7)"]


def test_ids_that_differ_in_case_alone_are_refused(tmp_path):
    table = table_of(tmp_path, "id,volume,report\nx,a.nii.gz,R\nX,b.nii.gz,R\n")
    assert [case.id for case in table.cases] == ["x"] and table.listed["duplicate_id"] == ["X"]


@pytest.mark.parametrize("nothing", ["NA", "NaN", "nan", "", " ", "N/A", "null", "None", "#N/A"])
def test_a_patient_without_a_name_is_the_case(tmp_path, nothing):
    rows = "".join(f"{n},{nothing},{n}.nii.gz,R\n" for n in "abc")
    table = table_of(tmp_path, f"id,patient,volume,report\n{rows}")
    assert [case.patient for case in table.cases] == ["a", "b", "c"] and table.counts["no_patient"] == 3


@pytest.mark.parametrize("nothing", ["nan", "NA", "N/A", "", "  ", "None.", "NULL", "Not given.", "-"])
def test_a_report_that_is_none_is_noted_in_every_format(tmp_path, nothing):
    assert table_of(tmp_path, f"id,volume,report\n1,a.nii.gz,{nothing}\n2,b.nii.gz,R\n").listed["no_report"] == ["1"]
    rows = f"VolumeName,Findings_EN,Impressions_EN\ntrain_1_a_1,{nothing},{nothing}\ntrain_2_a_1,R,\n"
    table = table_of(tmp_path, rows.replace("_1,", "_1.nii.gz,"), ("train_1_a_1", "train_2_a_1"), "ct-rate")
    assert table.listed["no_report"] == ["train_1_a_1"]
    rows = f"BDMAP ID,narrative report\na,{nothing}\nb,R\n"
    assert table_of(tmp_path, rows, format="abdomenatlas3").listed["no_report"] == ["a"]


def test_numbers_and_nan_as_pandas_writes_them(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"x")
    lines = ['{"id": 1.0, "patient": NaN, "volume": "a.nii.gz", "report": "R"}']
    lines += ['{"id": 2.0, "patient": NaN, "volume": "a.nii.gz", "report": NaN}']
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    table = read(tmp_path)
    assert [(case.id, case.patient) for case in table.cases] == [("1", "1")] and table.listed["no_report"] == ["2"]


@pytest.mark.parametrize(
    ("word", "split"),
    [
        *(("TRAIN", "train"), ("Train ", "train"), ("Training set", "train"), ("VALIDATION", "validation")),
        *(("Val", "validation"), ("Dev", "validation"), ("TEST", "test"), ("test_set", "test"), ("held-out", "test")),
    ],
)
def test_splits_in_any_case_and_the_usual_words(tmp_path, word, split):
    assert table_of(tmp_path, f"id,volume,report,split\n1,a.nii.gz,R,{word}\n").cases[0].split == split


SEVERAL = {  # what a row says: what is read, or why nothing is
    "files": ({"volume": ["a.nii", "b.nii"]}, [("a.nii", None), ("b.nii", None)]),
    "json": ({"volume": '["a.nii", "b.nii"]'}, [("a.nii", None), ("b.nii", None)]),
    "named": ({"volume": "a.nii", "series": ["lung", "bone"]}, [("a.nii", "lung"), ("a.nii", "bone")]),
    "paired": ({"volume": ["a.nii", "b.nii"], "series": ["1.2", "1.3#2"]}, [("a.nii", "1.2"), ("b.nii", "1.3#2")]),
    "one": ({"volume": ["b.nii"], "series": "lung"}, [("b.nii", "lung")]),
    "three": ({"volume": "a.nii", "series": ["1", "2", "3"]}, "lists 3, data.spec.series reads 2 of a case"),
    "uneven": ({"volume": ["a.nii", "b.nii"], "series": ["1", "2", "3"]}, "3 for 2 volumes"),
    "twice": ({"volume": ["a.nii", "a.nii"]}, "lists one twice"),
    "gone": ({"volume": ["a.nii", "c.nii"]}, "nothing under this path"),
    "none": ({"volume": []}, "no volume"),
}


def test_a_row_may_list_the_series_of_an_examination(tmp_path):
    rows = [{"id": name, "report": "R.", **row} for name, (row, _) in SEVERAL.items()]
    scans.write_manifest(tmp_path / "manifest.jsonl", rows)
    for name in ("a.nii", "b.nii"):
        (tmp_path / name).write_bytes(b"x")
    experiment = scans.experiment(spec=scans.SPEC.model_copy(update={"series": 2}))
    table = cases.read_manifest(str(tmp_path / "manifest.jsonl"), "jsonl", str(tmp_path), experiment.data)
    found = {case.id: [(Path(each.volume).name, each.series) for each in case.every_series] for case in table.cases}
    why = {each.case_id: each.message for each in table.rejections}
    for name, (_, expected) in SEVERAL.items():
        assert expected in why[name] if isinstance(expected, str) else found[name] == expected
    assert len(found) + len(why) == len(SEVERAL) and "scan_without_row" not in table.counts
    with_one = cases.read_manifest(str(tmp_path / "manifest.jsonl"), "jsonl", str(tmp_path), scans.experiment().data)
    assert [case.id for case in with_one.cases] == ["one"]
    assert "lists 2, data.spec.series reads 1" in with_one.rejections[0].message


def test_a_split_of_another_name_is_an_invalid_row(tmp_path):
    table = table_of(tmp_path, "id,volume,report,split\n1,a.nii.gz,R,fold 3\n2,b.nii.gz,R,NA\n")
    assert table.listed["invalid_row"] == ["1"] and "split" in table.rejections[0].message
    assert [case.id for case in table.cases] == ["2"]


def test_rows_of_commas_are_no_rejected_scans(tmp_path):
    table = table_of(tmp_path, "id,volume,report\n1,a.nii.gz,R\n,,\n , ,\n")
    assert not table.rejections and table.listed["blank_row"] == ["row 2", "row 3"] and table.counts["rows"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "id;patient;volume;report\n001;007;a.nii.gz;Emphysema, bullous.\n",
        "sep=;\nid;patient;volume;report\n001;007;a.nii.gz;Emphysema, bullous.\n",
        "id\tpatient\tvolume\treport\r\n001\t007\ta.nii.gz\tEmphysema, bullous.\r\n",
        'ID,Patient,Volume,REPORT\n001,007,a.nii.gz,"Emphysema, bullous."\n',
        'id, patient, volume, report\n001, 007, a.nii.gz, "Emphysema, bullous."\n',
        '\ufeffid,patient,volume,report\n001,007,a.nii.gz,"Emphysema, bullous."\n',
        'id,patient,volume,report\n001,007,a.nii.gz,"Emphysema, bullous."\n'.encode("utf-16"),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path, text):
    case = table_of(tmp_path, text).cases[0]
    assert (case.id, case.patient, case.report) == ("001", "007", "Emphysema, bullous.")


def test_cells_beyond_the_header_are_noted(tmp_path):
    table = table_of(tmp_path, "id,volume,report\n1,a.nii.gz,Emphysema, bullous.\n")
    assert table.listed["extra_cells"] == ["row 1"]


def test_ct_rates_contradicting_rows(tmp_path):
    text = "VolumeName,Findings_EN\na.nii.gz,First.\na.nii.gz ,Second.\nb.nii.gz,None.\n"
    table = table_of(tmp_path, text, format="ct-rate")
    assert [case.report for case in table.cases] == ["Findings: First."]
    assert table.counts["rows"] == 3 and table.listed["duplicate_id"] == ["a.nii.gz"] and not table.rejections


MANIFESTS = {
    "manifest-blank-rows/e.csv": (10, {"blank_row": 3}),
    "manifest-na-patients/b.csv": (10, {"no_patient": 10}),
    "manifest-nan-reports/m.csv": (1, {"no_report": 4}),
    "manifest-trailing-spaces/d.csv": (10, {"name_mended": 5}),
    "manifest-capital-splits/c.csv": (6, {}),
    **{f"manifest-separators/{name}.csv": (1, {}) for name in ("capital", "semicolon", "spaces", "tab")},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_others_reported(shared, tmp_path, name):
    path = shared / "data" / "text" / name
    rows = path.read_text("utf-8-sig")
    for volume in set(re.findall(r"\w+\.nii\.gz", rows)):
        (tmp_path / volume).write_bytes(b"x")
    table = cases.read_manifest(str(path), "csv", str(tmp_path), DATA)
    number, notes = MANIFESTS[name]
    assert len(table.cases) == number and not table.rejections
    assert {code: table.counts.get(code) for code in notes} == notes
    if "spaces/d" in name:
        assert len({(case.patient, case.split) for case in table.cases}) == 1
    if "na-patients" in name:
        assert len({case.patient for case in table.cases}) == 10
    if "splits" in name:
        assert [[case.split for case in table.cases].count(split) for split in FRACTIONS] == [3, 1, 2]


def test_the_rows_of_ct_rate_that_others_reported(shared):
    folder = shared / "data" / "text" / "manifest-ct-rate-rows"
    table = cases.read_manifest(str(folder / "t"), "ct-rate", str(folder / "v"), DATA)
    assert [case.id for case in table.cases] == ["train_1_a_1", "train_2_a_1", "valid_1_a_1"]
    assert table.counts["rows"] == 5 and table.listed["duplicate_id"] == ["train_2_a_1.nii.gz"]
    assert table.listed["other_reconstruction"] == ["train_1_a_2.nii.gz"]
    assert table.cases[2].report == "Impression: Normal."


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

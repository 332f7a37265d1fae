"""The public data sets' manifests: on small ones made here, and on the real ones where they are there."""

import csv
import json
from pathlib import Path

import pytest
import small_scans as scans

from mu2llm import cases
from mu2llm.cases.rows import compose

DATA = scans.experiment().data


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


@pytest.fixture
def ct_rate(tmp_path):
    names = ["train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1", "valid_1_a_1", "valid_2_a_1"]
    volumes = [f"{name}.nii.gz" for name in names]
    root = tmp_path / "dataset"
    write_csv(
        root / "radiology_text_reports" / "reports.csv",
        [
            {"VolumeName": v, "Technique_EN": "", "Findings_EN": f"F {v}", "Impressions_EN": "Not given."}
            for v in volumes
        ],
    )
    write_csv(
        root / "metadata" / "metadata.csv",
        [
            {"VolumeName": v, "RescaleIntercept": -8192 if n else -1024, "RescaleSlope": 1, "ZSpacing": 1}
            for n, v in enumerate([*volumes[:5], "train_9_a_1.nii.gz"])
        ],
    )
    write_csv(
        root / "labels" / "labels.csv", [{"VolumeName": v, "Medical material": 1, "Emphysema": 0} for v in volumes[:3]]
    )
    write_csv(root / "other.csv", [{"AccessionNo": "1"}])
    for name in ("train_1/train_1_a/train_1_a_2", "train_1/train_1_b/train_1_b_1", "train_2/train_2_a/train_2_a_1"):
        touch(root / "train" / f"{name}.nii.gz")
    touch(root / "train_fixed" / "train_2" / "train_2_a" / "train_2_a_1.nii.gz")
    touch(root / "valid" / "valid_1" / "valid_1_a" / "valid_1_a_1.nii.gz")
    return root


def test_ct_rate_rows_of_labels_that_contradict_are_said(ct_rate):
    """The last of them won, unnoted."""
    row = {"VolumeName": "train_1_a_2.nii.gz", "Medical material": 0, "Emphysema": 1}
    write_csv(ct_rate / "labels" / "more.csv", [row])
    table = cases.read_manifest(str(ct_rate), "ct-rate", str(ct_rate), DATA)
    assert "train_1_a_2.nii.gz" in table.listed["duplicate_id"]


def test_ct_rate_has_one_reconstruction_a_scan_its_split_and_its_rescale(ct_rate):
    table = cases.read_manifest(str(ct_rate), "ct-rate", str(ct_rate), DATA)
    assert [(c.id, c.patient, c.split) for c in table.cases] == [
        ("train_1_a_2", "train_1", "train"),
        ("train_1_b_1", "train_1", "train"),
        ("train_2_a_1", "train_2", "validation"),
        ("valid_1_a_1", "valid_1", "test"),
    ]
    assert [c.rescale for c in table.cases] == [(1.0, -8192.0)] * 4
    assert table.cases[0].labels == {"Medical material": 1, "Emphysema": 0} and table.cases[2].labels is None
    assert table.cases[0].report == "Findings: F train_1_a_2.nii.gz"
    assert "/train_fixed/" in table.cases[2].volume
    assert table.listed["other_reconstruction"] == ["train_1_a_1.nii.gz"]
    assert table.listed["not_found"] == ["valid_2_a_1"] == table.listed["no_rescale"]
    assert table.listed["several_volumes"] == ["train_2_a_1.nii.gz"]
    assert table.listed["scan_without_report"] == ["train_9_a_1.nii.gz"]
    assert table.listed["no_labels"] == ["train_2_a_1", "valid_1_a_1", "valid_2_a_1"]
    assert [name.rpartition("/")[2] for name in table.listed["unknown_files"]] == ["other.csv"]


def test_ct_rate_has_a_test_split_and_validation_of_other_patients(ct_rate):
    """`valid` is what results are published on: it was the validation split, and nothing was left to test."""
    names = [f"train_{n}_{scan}_1.nii.gz" for n in range(10, 60) for scan in "ab"]
    rows = [{"VolumeName": v, "Technique_EN": "", "Findings_EN": "F", "Impressions_EN": ""} for v in names]
    write_csv(ct_rate / "radiology_text_reports" / "more.csv", rows)
    for name in names:
        touch(ct_rate / "train" / name)
    table = cases.read_manifest(str(ct_rate), "ct-rate", str(ct_rate), DATA)
    of = {split: {c.patient for c in table.cases if c.split == split} for split in ("train", "validation", "test")}
    assert of["test"] == {"valid_1"} and not of["train"] & of["validation"]
    assert 2 <= len(of["validation"]) <= 14 and len(of["train"] | of["validation"]) == 52
    assert set(table.listed["validation_from_train"]) == of["validation"]
    whole = DATA.model_copy(update={"split": {"train": 1.0, "validation": 0.0, "test": 0.0}})
    assert {c.split for c in cases.read_manifest(str(ct_rate), "ct-rate", str(ct_rate), whole).cases} == {
        "train",
        "test",
    }


def test_ct_rate_cells_that_are_no_numbers_are_counted_and_cost_no_scan(ct_rate):
    names = ["train_1_b_1", "train_2_a_1", "valid_1_a_1"]
    broken = zip(names, ("-1024", "", "nan"), ("", "1", "1"), strict=True)
    rows = [
        {"VolumeName": f"{n}.nii.gz", "RescaleIntercept": i, "RescaleSlope": s, "ZSpacing": 1} for n, i, s in broken
    ]
    rows.append({"VolumeName": "train_1_a_2.nii.gz", "RescaleIntercept": "-8192", "RescaleSlope": "1.0", "ZSpacing": 1})
    write_csv(ct_rate / "metadata" / "metadata.csv", rows)
    labels = [{"VolumeName": "train_1_a_2.nii.gz", "Medical material": "?", "Emphysema": ""}]
    labels.append({"VolumeName": "train_1_b_1.nii.gz", "Medical material": "1.0", "Emphysema": ""})
    write_csv(ct_rate / "labels" / "labels.csv", labels)
    table = cases.read_manifest(str(ct_rate), "ct-rate", str(ct_rate), DATA)
    assert [c.rescale for c in table.cases] == [(1.0, -8192.0), None, None, None]
    assert set(names) <= set(table.listed["no_rescale"])
    assert [c.labels for c in table.cases[:2]] == [None, {"Medical material": 1, "Emphysema": 0}]


def test_ct_rate_has_a_scan_s_reconstructions_together(ct_rate):
    """Those that are there, each with its own slope and intercept, as one case named by the first."""
    touch(ct_rate / "train" / "train_1_a_1.nii.gz")
    spec = DATA.spec.model_copy(update={"series": 2})
    data = DATA.model_copy(update={"reconstructions": "together", "spec": spec})
    table = cases.read_manifest(str(ct_rate), "ct-rate", str(ct_rate), data)
    first, *others = table.cases
    found = [(Path(each.volume).name, each.rescale) for each in first.every_series]
    assert first.id == "train_1_a_1"
    assert found == [("train_1_a_1.nii.gz", (1.0, -1024.0)), ("train_1_a_2.nii.gz", (1.0, -8192.0))]
    assert len(others) == 3 and not any(case.further for case in others)
    assert "other_reconstruction" not in table.counts
    assert not any("train_1_" in name for name in table.listed["scan_without_row"])


def test_ct_rate_has_all_reconstructions_on_request(ct_rate):
    data = DATA.model_copy(update={"reconstructions": "all"})
    table = cases.read_manifest(str(ct_rate), "ct-rate", str(ct_rate), data)
    assert table.counts["rows"] == 6 and "other_reconstruction" not in table.counts
    assert sorted(table.listed["not_found"]) == ["train_1_a_1", "valid_2_a_1"]


def test_ct_rate_by_the_table_of_reports_finds_the_others_beside_it(ct_rate, tmp_path):
    for file in list(ct_rate.rglob("*.csv")):
        file.rename(ct_rate / file.name)
    whole = cases.read_manifest(str(ct_rate), "ct-rate", str(ct_rate), DATA)
    one = cases.read_manifest(str(ct_rate / "reports.csv"), "ct-rate", str(ct_rate), DATA)
    assert one.cases == whole.cases


def test_a_stray_quotation_mark_parts_findings_and_impression():
    assert (
        compose('Lungs are clear. " Normal chest.', "Not given.")
        == "Findings: Lungs are clear. Impression: Normal chest."
    )
    assert compose('A "tree in bud" pattern.', "") == 'Findings: A "tree in bud" pattern.'
    assert compose("A.", "B.") == "Findings: A. Impression: B."
    assert compose("Not given.", None) == ""


def amos_entry(number, **findings):
    entry = {"image": f"./imagesVa/amos_{number:04d}.nii.gz", "meta": {}, "labels": {"report": {"findings": findings}}}
    entry["labels"]["qa"] = [{"question": "Which?", "options": {"A": "one", "B": "two"}, "answer": "B"}]
    return entry


def test_amos_has_findings_by_region_and_choices(tmp_path):
    second = amos_entry(2, chest="", abdomen="")
    third = {**amos_entry(3, pelvis="Free fluid."), "spacing": [-0.7, 0.7, 5.0]}
    document = {
        "training": [amos_entry(1, chest="Clear\nlungs.", abdomen="", pelvis="Normal.")],
        "validation": [second, third],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    for number in (1, 2, 3):
        touch(tmp_path / "imagesVa" / f"amos_{number:04d}.nii.gz")
    table = cases.read_manifest(str(tmp_path / "dataset.json"), "amos-mm", str(tmp_path), DATA)
    first, third = table.cases
    assert first.report == "Chest: Clear lungs. Pelvis: Normal." and first.split == "train"
    assert [(q.region, q.answer) for q in first.questions] == [
        ("chest", "Clear lungs."),
        ("pelvis", "Normal."),
        (None, "B. two"),
    ]
    assert first.questions[-1].question == "Which?\nA. one\nB. two"
    assert table.listed["no_report"] == ["amos_0002"] and table.listed["negative_spacing"] == ["amos_0003"]
    assert table.listed["no_region"] == ["amos_0001 abdomen", "amos_0003 chest", "amos_0003 abdomen"]


def test_entries_that_are_none_are_rejected_one_by_one(tmp_path):
    good = amos_entry(1, chest="Clear.")
    bad = [{**amos_entry(2, chest="Clear."), "spacing": [None, 1, 1]}, {**amos_entry(3), "labels": "none"}, "amos_0004"]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [good, *bad]}))
    for number in (1, 2, 3):
        touch(tmp_path / "imagesVa" / f"amos_{number:04d}.nii.gz")
    table = cases.read_manifest(str(tmp_path / "dataset.json"), "amos-mm", str(tmp_path), DATA)
    assert [case.id for case in table.cases] == ["amos_0001"]
    assert table.counts["invalid_row"] == 3 and {r.reason for r in table.rejections} == {"invalid_row"}
    touch(tmp_path / "ct" / "1.nii.gz")
    (tmp_path / "ct" / "1.txt").write_text("Clear.")
    (tmp_path / "m3d.json").write_text(json.dumps({"train": [{"image": "ct/1.npy", "text": "ct/1.txt"}, "ct/2", None]}))
    m3d = cases.read_manifest(str(tmp_path / "m3d.json"), "m3d-cap", str(tmp_path), DATA)
    assert [case.report for case in m3d.cases] == ["Clear."] and m3d.counts["invalid_row"] == 2


def test_amos_lists_with_another_machines_paths_are_found(tmp_path):
    entry = {"image": "/far/away/Processed/amos_1/amos_1.npy", "text": "/far/away/Processed/amos_1/text.json"}
    (tmp_path / "list.json").write_text(json.dumps({"train": [entry]}))
    touch(tmp_path / "imagesTr" / "amos_1.nii.gz")
    touch(tmp_path / "texts" / "amos_1" / "text.json")
    (tmp_path / "texts" / "amos_1" / "text.json").write_text(json.dumps({"report": {"findings": {"chest": "Clear."}}}))
    table = cases.read_manifest(str(tmp_path / "list.json"), "amos-mm", str(tmp_path), DATA)
    assert table.cases[0].volume.endswith("imagesTr/amos_1.nii.gz") and table.cases[0].report == "Chest: Clear."


def test_abdomenatlas_takes_the_best_report_and_counts_lesions(tmp_path):
    rows = [
        {
            "BDMAP ID": "BDMAP_1",
            "number of liver lesion instances": "2",
            "narrative report": "N",
            "fusion narrative report": "F",
        },
        {
            "BDMAP ID": "BDMAP_2",
            "number of liver lesion instances": "0",
            "narrative report": "N2",
            "fusion narrative report": "",
        },
        {
            "BDMAP ID": "BDMAP_3",
            "number of liver lesion instances": "unknown",
            "narrative report": "",
            "fusion narrative report": "",
        },
    ]
    write_csv(tmp_path / "tables" / "reports.csv", rows)
    write_csv(
        tmp_path / "tables" / "notes.csv",
        [{"Notes": "Radiologist's notes: \nCyst.", "BDMAP ID": "BDMAP_3"}, {"Notes": "x", "BDMAP ID": ""}],
    )
    touch(tmp_path / "BDMAP_1" / "ct.nii.gz")
    touch(tmp_path / "images" / "BDMAP_2_0000.nii.gz")
    touch(tmp_path / "BDMAP_3" / "ct.nii.gz")
    table = cases.read_manifest(str(tmp_path / "tables"), "abdomenatlas3", str(tmp_path), DATA)
    found = sorted(table.cases, key=lambda case: case.id)
    assert [(c.id, c.report, c.labels) for c in found] == [
        ("BDMAP_1", "F", {"liver lesion": 1}),
        ("BDMAP_2", "N2", {"liver lesion": 0}),
        ("BDMAP_3", "Cyst.", None),
    ]
    assert table.counts["invalid_row"] == 1 and found[1].volume.endswith("images/BDMAP_2_0000.nii.gz")


def test_m3d_reads_the_reports_files(tmp_path):
    def entry(number):
        return {"image": f"ct/{number}/Axial.npy", "text": f"ct/{number}/text.txt"}

    document = {"train": [entry(1)], "validation": [entry(2)], "test": [entry(3), entry(4)], "test1k": [entry(3)]}
    (tmp_path / "M3D.json").write_text(json.dumps(document))
    for number in (1, 2, 3):
        touch(tmp_path / "ct" / str(number) / ("Axial.nii.gz" if number < 3 else "Axial.npy"))
        (tmp_path / "ct" / str(number) / "text.txt").write_text(f"Report\n{number}")
    table = cases.read_manifest(str(tmp_path / "M3D.json"), "m3d-cap", str(tmp_path), DATA)
    assert [(c.id, c.patient, c.report, c.split) for c in table.cases] == [
        ("ct/1/Axial", "ct/1", "Report 1", "train"),
        ("ct/2/Axial", "ct/2", "Report 2", "validation"),
        ("ct/3/Axial", "ct/3", "Report 3", "test"),
    ]
    assert table.cases[0].volume.endswith("ct/1/Axial.nii.gz") and table.cases[2].volume.endswith("Axial.npy")
    assert table.listed["no_report"] == ["ct/4/Axial"] and table.counts["rows"] == 4


def test_the_real_ct_rate_tables(shared, tmp_path):
    manifests = shared / "data" / "manifests" / "ct_rate"
    for name in ("train_17051_a_1", "valid_1049_a_1"):
        touch(tmp_path / f"{name}.nii.gz")
    table = cases.read_manifest(str(manifests), "ct-rate", str(tmp_path), DATA)
    first, second = table.cases
    assert table.counts["rows"] == 25 and table.counts["not_found"] == 23
    assert first.report.endswith("Impression: Thoracic CT examination within normal limits")
    assert first.split == "train" and first.rescale is None and len(first.labels) == 18
    assert second.split == "test" and second.rescale in ((1.0, -1024.0), (1.0, -8192.0))
    assert table.counts["scan_without_report"] == 3038 and table.counts["unknown_files"] == 2


def test_the_real_amos_and_atlas_and_m3d_manifests(shared, tmp_path):
    manifests = shared / "data" / "manifests"
    for name in ("imagesVa/amos_0034.nii.gz", "BDMAP_00001694/ct.nii.gz", "ct_case/000014/Axial_non_contrast.nii.gz"):
        touch(tmp_path / name)
    touch(tmp_path / "ct_case" / "000014" / "text.txt")
    amos = cases.read_manifest(str(manifests / "amos_mm" / "dataset.sample.json"), "amos-mm", str(tmp_path), DATA)
    assert (
        amos.cases[0].report.startswith("Chest: Both sides")
        and amos.cases[0].questions[-1].answer == "D. Ascending colon cancer"
    )
    atlas = cases.read_manifest(str(manifests / "abdomenatlas3"), "abdomenatlas3", str(tmp_path), DATA)
    assert atlas.cases[0].report.startswith("Left breast massive mass") and atlas.counts["rows"] > 3600
    m3d = cases.read_manifest(
        str(manifests / "m3d_cap" / "M3D_Cap_npy.schema_sample.json"), "m3d-cap", str(tmp_path), DATA
    )
    assert m3d.cases[0].report == "x" and m3d.counts["no_report"] == 1

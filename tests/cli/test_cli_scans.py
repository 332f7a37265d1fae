"""`mu2llm inspect` and `mu2llm ingest`, run in this process."""

import json
from pathlib import Path

import pytest
import small_scans
from ct_scans import SERIES, chest, nifti, slices, to_bytes

from mu2llm import cases

KEYS = ["path", "status", "reason", "message", "warnings", "shape", "spacing", "orientation", "hu_range", "sha256"]
KEYS += ["others"]


@pytest.fixture
def study(tmp_path):
    """A folder with two series: thick and thin slices of one chest."""
    folder = tmp_path / "study"
    folder.mkdir()
    thin = slices(chest(), SeriesDescription="thin")
    thick = slices(chest((24, 20, 8)), SeriesDescription="thick", SeriesInstanceUID="1.2.9")
    for number, each in enumerate([*thin, *thick]):
        (folder / f"IM{number}").write_bytes(to_bytes(each))
    return folder


def test_inspect_prints_the_items_of_the_contract_for_good_scans_and_bad(run, tmp_path):
    (tmp_path / "good.nii.gz").write_bytes(nifti(chest()))
    code, out, _ = run("inspect", tmp_path / "good.nii.gz", tmp_path / "absent.nii.gz", "--json")
    good, absent = json.loads(out)
    assert code == 0 and list(good) == list(absent) == KEYS
    assert (good["status"], absent["status"], absent["reason"]) == ("ok", "rejected", "not_found")


def test_inspect_reads_the_series_that_is_asked_for(run, study):
    shapes = {}
    for asked in ([], ["--series", "thick"], ["--series", SERIES], ["--series", "coronal"]):
        (item,) = json.loads(run("inspect", study, "--json", *asked)[1])
        shapes[" ".join(asked[1:])] = item["shape"] and item["shape"][2], item["reason"]
    assert shapes == {"": (16, None), "thick": (8, None), SERIES: (16, None), "coronal": (None, "no_series")}


def test_inspect_says_how_to_read_what_was_not_read(run, study):
    told = run("inspect", study)[1]
    assert "8 slices" in told and "thick; --series 1.2.9 reads it" in told
    (item,) = json.loads(run("inspect", study, "--series", "1.2.9", "--json")[1])
    assert list(item["others"]) == [SERIES]


def test_inspect_lets_in_an_unknown_orientation_on_request(run, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(nifti(chest(), sform_code=0, qform_code=0))
    for more, status in (([], "rejected"), (["--accept", "unknown_orientation"], "ok")):
        (item,) = json.loads(run("inspect", tmp_path / "scan.nii.gz", "--json", *more)[1])
        assert item["status"] == status
    code, out, err = run("inspect", tmp_path / "scan.nii.gz", "--accept", "slice_gap")
    assert code == 2 and out == "" and "slice_gap" in err


def test_pictures_of_scans_with_the_same_name_do_not_overwrite_each_other(run, tmp_path):
    for patient in ("a", "b"):
        (tmp_path / patient).mkdir()
        (tmp_path / patient / "scan.nii.gz").write_bytes(nifti(chest(seed=ord(patient))))
    paths = [tmp_path / patient / "scan.nii.gz" for patient in ("a", "b")]
    items = json.loads(run("inspect", *paths, "--json", "--save-png", tmp_path / "png")[1])
    first, second = (Path(item["png"]).read_bytes() for item in items)
    assert first != second


def test_people_are_told_everything_in_a_narrow_terminal_too(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    (tmp_path / "scan[red].nii").write_bytes(nifti(chest() + 1024, compress=False))
    (tmp_path / "empty.nii").write_bytes(b"")
    code, out, _ = run("inspect", tmp_path / "scan[red].nii", tmp_path / "empty.nii")
    first, facts, warning, second, why = out.splitlines()
    assert code == 0 and first.endswith("scan[red].nii") and second.endswith("empty.nii")
    assert "24×20×16 voxels of 2×2.5×3 mm, stored RAS" in facts and "not_hu: the distribution" in warning
    assert "rejected  empty: the file has no bytes" in why


def ingest(run, folder, out, *more):
    settings = f"data.spec={json.dumps(small_scans.SPEC.model_dump(mode='json'))}"
    return run(
        *("ingest", "--manifest", folder / "manifest.jsonl", "--volumes", folder, "--out", out, "--json"),
        *("--set", settings, "--set", "model.vision.patch_size=[1,4,4]", *more),
    )


def test_ingest_says_what_the_contract_says_and_fails_over_its_budget(ray_cluster, run, tmp_path):
    small_scans.write(tmp_path, 8)
    code, out, _ = ingest(run, tmp_path, tmp_path / "out")
    result = json.loads(out)
    assert code == 0 and list(result) == ["cases", "written", "rejected", "seconds", "bytes", "splits"]
    assert result["written"] == 8 == sum(result["splits"].values())
    (tmp_path / "volumes" / "case-003.nii.gz").write_bytes(b"")
    code, out, err = ingest(run, tmp_path, tmp_path / "out")
    assert code == 1 and "1 of 8 scans were rejected (empty 1)" in err
    assert json.loads(out)["written"] == 7 and json.loads(out)["rejected"] == {"empty": 1}
    assert cases.Shards.open(str(tmp_path / "out")).count("train") > 0
    code, out, _ = ingest(run, tmp_path, tmp_path / "out", "--set", "data.rejection_budget=0.2")
    assert code == 0 and json.loads(out)["rejected"] == {"empty": 1}


def test_a_dicom_folder_that_was_mended_is_read_again(ray_cluster, run, tmp_path):
    rows = small_scans.write(tmp_path, 3)
    folder = tmp_path / "volumes" / "series"
    folder.mkdir()
    datasets = [to_bytes(each) for each in slices(chest())]
    for number, data in enumerate(datasets):
        (folder / f"IM{number}").write_bytes(data)
    rows[0]["volume"] = "volumes/series"
    small_scans.write_manifest(tmp_path / "manifest.jsonl", rows)
    (folder / "IM5").write_bytes(datasets[5][:-100])  # cut off
    assert ingest(run, tmp_path, tmp_path / "out")[0] == 1
    (folder / "IM5").write_bytes(datasets[5])
    code, out, _ = ingest(run, tmp_path, tmp_path / "out")
    assert code == 0 and json.loads(out)["written"] == 3

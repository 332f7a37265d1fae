"""What `inspect` says of a scan."""

from __future__ import annotations

import hashlib
import json

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
from ct_scans import AFFINE, chest, nifti

from mu2llm.ct import REASONS, WARNINGS, Rejection, admit, inspect, read, three_planes
from mu2llm.ct.codes import ACCEPTABLE, in_order


def test_an_item(tmp_path):
    path = tmp_path / "scan.nii.gz"
    affine = AFFINE @ nib.orientations.inv_ornt_aff([[0, -1], [1, -1], [2, 1]], (24, 20, 16))
    path.write_bytes(nifti(chest()[::-1, ::-1], affine))
    item = inspect(path)
    canonical = nib.as_closest_canonical(nib.load(path))
    rounded = np.round(canonical.get_fdata()).astype(np.int16)
    assert json.loads(json.dumps(item)) == {
        "path": str(path),
        "status": "ok",
        "reason": None,
        "message": None,
        "warnings": [],
        "shape": [24, 20, 16],
        "spacing": [2.0, 2.5, 3.0],
        "orientation": "LPS",
        "hu_range": [float(rounded.min()), float(rounded.max())],
        "sha256": hashlib.sha256(np.ascontiguousarray(rounded).tobytes()).hexdigest(),
        "others": {},
    }


def test_sha256_is_of_rounded_values_in_c_order():
    stored = np.random.default_rng(0).normal(0, 300, (70, 5, 6)).astype(np.float32).clip(-1024)
    expected = hashlib.sha256(np.round(stored).astype("<i2").tobytes(order="C")).hexdigest()
    assert read(nifti(stored)).sha256 == expected


def test_a_rejected_item_has_the_same_keys(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"")
    item = inspect(tmp_path / "scan.nii.gz")
    assert (item["status"], item["reason"], item["sha256"]) == ("rejected", "empty", None)
    assert item["message"]
    (tmp_path / "good.nii.gz").write_bytes(nifti(chest()))
    assert item.keys() == inspect(tmp_path / "good.nii.gz").keys()
    assert inspect(tmp_path / "none.nii.gz")["reason"] == "not_found"


def test_not_hu_is_inspected_but_not_admitted(tmp_path):
    path = tmp_path / "mr.nii.gz"
    path.write_bytes(nifti(np.random.default_rng(0).gamma(2, 150, (9, 9, 9)).astype(np.int16)))
    item = inspect(path)
    assert (item["status"], item["warnings"]) == ("ok", ["not_hu"])
    assert item["sha256"]
    volume = read(path)
    with pytest.raises(Rejection) as rejected:
        admit(volume)
    assert (rejected.value.reason, rejected.value.uri) == ("not_hu", str(path))
    assert admit(volume, accept=("not_hu",)) is volume
    assert admit(read(nifti(chest()))).warnings == ()


def test_a_picture_is_drawn_of_the_volume_that_was_read(tmp_path, monkeypatch):
    (tmp_path / "scan.nii.gz").write_bytes(nifti(chest()))
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    read_once = []
    monkeypatch.setattr("mu2llm.ct.inspection.read", lambda *a, **k: (read_once.append(a), read(*a, **k))[1])
    item = inspect(tmp_path / "scan.nii.gz", str(tmp_path / "pictures" / "scan.png"))
    assert len(read_once) == 1 and item["png"] == str(tmp_path / "pictures" / "scan.png")
    assert matplotlib.image.imread(item["png"]).shape[2] in (3, 4)
    rejected = inspect(tmp_path / "empty.nii.gz", str(tmp_path / "pictures" / "empty.png"))
    assert rejected["png"] is None and rejected.keys() == item.keys()


def test_three_planes_show_the_patients_right_at_the_left(tmp_path):
    hu = np.full((40, 40, 40), -1000, np.int16)
    hu[30:, :, :] = 400  # the patient's right
    three_planes(read(nifti(hu)), tmp_path / "planes.png")
    picture = matplotlib.image.imread(tmp_path / "planes.png")[..., 0]
    axial = picture[picture.shape[0] // 2, : picture.shape[1] // 3]
    where = np.flatnonzero(axial < 0.5)  # the black of the air
    assert axial[where[0] - 20 : where[0]].mean() > 0.9
    assert picture.ndim == 2 and picture.std() > 0.1


def test_codes_are_one_documented_list():
    assert set(ACCEPTABLE) <= set(REASONS)
    assert {"tilt_resampled", "gap_resampled", "padding_clipped", "no_modality", "not_hu"} <= set(WARNINGS)
    assert set(REASONS) & set(WARNINGS) == {"not_hu"}
    assert in_order(["not_hu", "padding_clipped", "not_hu"]) == ("padding_clipped", "not_hu")
    assert all(text and not text.endswith(".") for text in (*REASONS.values(), *WARNINGS.values()))

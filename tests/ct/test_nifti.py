"""NIfTI: types, byte orders, scaling, orientation and geometry."""

from __future__ import annotations

import itertools
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from ct_scans import AFFINE, chest, nifti

from mu2llm.ct import Rejection, read


def reason(data: bytes, **options: object) -> str:
    with pytest.raises(Rejection) as rejected:
        read(data, **options)  # type: ignore[arg-type]
    return rejected.value.reason


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "float32", "float64"])
def test_types_and_byte_orders(kind, big_endian, dtype):
    hu = chest()
    volume = read(nifti(hu.astype(dtype), kind=kind, big_endian=big_endian, compress=dtype != "int16"))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.hu.dtype == np.int16
    assert volume.hu.dtype.isnative
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.spacing_mm == (2, 2.5, 3)
    assert volume.warnings == ()


def test_scaled_bytes_come_back_as_hu():
    stored = np.random.default_rng(0).integers(0, 256, (9, 8, 7)).astype(np.uint8)
    volume = read(nifti(stored, scaling=(7.11, -1024)))
    expected = stored * float(np.float32(7.11)) - 1024
    np.testing.assert_allclose(volume.hu, expected, atol=1e-3)
    np.testing.assert_array_equal(np.rint(volume.hu), np.rint(expected))


def test_halves_round_as_in_float64():
    """slope 0.1f makes 25·slope just above 2.5, which float32 would round down to 2."""
    stored = np.arange(-1000, 1000, dtype=np.int16).reshape(10, 10, 20)
    volume = read(nifti(stored, scaling=(0.1, 0)))
    np.testing.assert_array_equal(np.rint(volume.hu), np.rint(stored * float(np.float32(0.1))))


def test_48_orientations_are_one_scan():
    hu = chest((8, 9, 10))
    canonical = read(nifti(hu))
    corner = canonical.affine @ [1, 2, 3, 1]
    seen = set()
    for axes, flips in itertools.product(itertools.permutations(range(3)), itertools.product([1, -1], repeat=3)):
        orientation = np.array(list(zip(axes, flips, strict=True)))
        stored = nib.orientations.apply_orientation(hu, orientation)
        affine = AFFINE @ nib.orientations.inv_ornt_aff(orientation, hu.shape)
        volume = read(nifti(stored, affine))
        assert volume.sha256 == canonical.sha256
        np.testing.assert_allclose(volume.affine @ [1, 2, 3, 1], corner, atol=1e-4)
        seen.add(volume.stored_axes)
    assert len(seen) == 48


def test_sform_wins_and_the_difference_is_said():
    other = AFFINE.copy()
    other[0, 3] += 50
    header = nib.Nifti1Header()
    header.set_sform(AFFINE, 1)
    fields = {name: header[name] for name in ("sform_code", "srow_x", "srow_y", "srow_z")}
    volume = read(nifti(chest(), other, **fields))
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.warnings == ("forms_differ",)


def test_pixdim_that_contradicts_an_sform_alone_is_said():
    volume = read(nifti(chest(), np.diag([1.0, 1, 1, 1]), qform_code=0, pixdim=[1, 1.5, 1.25, 2.5, 0, 0, 0, 0]))
    assert volume.spacing_mm == (1, 1, 1)
    assert volume.warnings == ("spacing_differs",)


@pytest.mark.parametrize("dtype", ["int16", "float64"])
def test_voxels_are_counted_not_bytes(dtype):
    """Both would be refused by what their header says, if they were too large."""
    for slices, expected in [(4096, "truncated"), (4097, "too_large")]:
        data = nifti(chest().astype(dtype), dim=[3, 512, 512, slices, 1, 1, 1, 1])
        assert reason(data) == expected


def test_wide_voxels_are_read_plane_by_plane(tmp_path):
    hu = chest((256, 256, 64))
    (tmp_path / "scan.nii").write_bytes(nifti(hu.astype(np.float64), compress=False))
    tracemalloc.start()
    volume = read(tmp_path / "scan.nii")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(volume.hu, hu)
    assert peak < 2 * hu.nbytes + 2**24  # of which the stream's buffer is half


def test_qform_where_the_sform_is_singular():
    volume = read(nifti(chest(), srow_x=[0, 0, 0, 0], srow_y=[0, 0, 0, 0], srow_z=[0, 0, 0, 0]))
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)


def test_unknown_orientation_is_rejected_or_accepted_on_request():
    data = nifti(chest(), sform_code=0, qform_code=0)
    assert reason(data) == "unknown_orientation"
    assert "orientation_assumed" in read(data, accept=["unknown_orientation"]).warnings


def test_negative_voxel_sizes_are_repaired():
    volume = read(nifti(chest(), pixdim=[1, -2, 2.5, 3, 0, 0, 0, 0]))
    assert "spacing_repaired" in volume.warnings
    assert volume.spacing_mm == (2, 2.5, 3)


def test_metres_are_converted():
    volume = read(nifti(chest(), np.diag([0.002, 0.0025, 0.003, 1]), xyzt_units=1))
    np.testing.assert_allclose(volume.spacing_mm, (2, 2.5, 3), rtol=1e-6)
    assert "units_converted" in volume.warnings


def test_trailing_axes_of_one_are_dropped():
    assert read(nifti(chest()[..., None])).hu.shape == (24, 20, 16)


def test_padding_and_missing_values_become_air():
    stored = chest().astype(np.float32)
    stored[:3] = -3024
    stored[3, 0, 0] = np.nan
    stored[3, 0, 1] = np.inf
    volume = read(nifti(stored))
    assert (volume.hu[:3] == -1024).all()
    assert (volume.hu[3, 0, :2] == -1024).all()
    assert volume.warnings == ("padding_clipped", "nonfinite_filled")
    np.testing.assert_array_equal(volume.hu[4:], chest()[4:])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (nifti(np.zeros((4, 4, 4), [(c, "u1") for c in "RGB"])), "rgb"),
        (nifti(np.zeros((4, 4, 4), np.complex64)), "complex"),
        (nifti(np.zeros((4, 4, 4, 3), np.int16)), "not_3d"),
        (nifti(np.zeros((4, 4), np.int16)), "not_3d"),
        (nifti(np.zeros((4, 4, 1), np.int16)), "single_slice"),
        (nifti(chest(), datatype=1), "corrupt"),
        (nifti(chest(), dim=[3, 24, 0, 16, 1, 1, 1, 1]), "empty"),
        (nifti(chest(), dim=[3, 3000, 3000, 3000, 1, 1, 1, 1]), "too_large"),
        (nifti(chest(), vox_offset=1e12), "corrupt"),
        (nifti(chest(), magic=b"ni1"), "unsupported_format"),
        (nifti(chest(), magic=b"xyz"), "unsupported_format"),
        (nifti(chest(), np.diag([0.001, 1, 1, 1])), "bad_geometry"),
        (nifti(chest(), np.diag([200, 1, 1, 1])), "bad_geometry"),
        (nifti(chest(), srow_x=[np.nan, 0, 0, 0], qform_code=0), "unknown_orientation"),
        (nifti(chest(), sform_code=0, pixdim=[1, 2, 0, 3, 0, 0, 0, 0]), "unknown_orientation"),
    ],
)
def test_what_is_no_scan_is_rejected(data, expected):
    assert reason(data) == expected


def test_shear_is_resampled_onto_a_straight_grid():
    """HU that are a linear function of the place stay that function of the place."""
    sheared = AFFINE.copy()
    sheared[1, 2] = 1.2  # 22° of gantry tilt
    places = sheared @ np.vstack([np.indices((12, 14, 10)).reshape(3, -1), np.ones(12 * 14 * 10)])
    field = (places[0] * 3 + places[1] * 5 - places[2] * 4).reshape(12, 14, 10)
    volume = read(nifti(field, sheared))
    assert "tilt_resampled" in volume.warnings
    axes = volume.affine[:3, :3]
    np.testing.assert_allclose(axes.T @ axes, np.diag(np.diag(axes.T @ axes)), atol=1e-9)
    index = np.indices(volume.hu.shape).reshape(3, -1)
    places = volume.affine @ np.vstack([index, np.ones(index.shape[1])])
    expected = places[0] * 3 + places[1] * 5 - places[2] * 4
    before = (np.linalg.inv(sheared) @ places)[:3].T
    inside = ((before > -1e-6) & (before < np.array([12, 14, 10]) - 1 + 1e-6)).all(axis=1)
    assert inside.sum() > 0.9 * 12 * 13 * 10
    np.testing.assert_allclose(volume.hu.reshape(-1)[inside], expected[inside], atol=0.01)
    outside = ((before < -1) | (before > np.array([12, 14, 10]))).any(axis=1)
    assert (volume.hu.reshape(-1)[outside] == -1024).all()


@pytest.mark.parametrize(
    "tilt", [{(1, 2): 1.2}, {(1, 2): -0.9}, {(0, 1): 0.7}, {(2, 0): 0.5}, {(0, 2): 0.5, (1, 2): 1.0}]
)
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_tilt_is_straightened_slice_by_slice_as_by_general_resampling(tilt, dtype, monkeypatch):
    sheared = AFFINE.copy()
    for place, by in tilt.items():
        sheared[place] += by
    data = nifti(chest().astype(dtype) + (0.25 if dtype == "float32" else 0), sheared)
    fast, only_shifts = read(data), []
    monkeypatch.setattr("mu2llm.ct.geometry._only_shifts", lambda *_: only_shifts.append(True))
    general = read(data)
    assert only_shifts and "tilt_resampled" in fast.warnings and fast.hu.dtype == dtype
    np.testing.assert_allclose(fast.affine, general.affine)
    np.testing.assert_allclose(fast.hu, general.hu, atol=1 if dtype == "int16" else 0.05)


def test_a_tilt_costs_no_general_resampling(monkeypatch):
    monkeypatch.delattr("scipy.ndimage.affine_transform")
    sheared = AFFINE.copy()
    sheared[1, 2] = 1.0
    assert read(nifti(chest(), sheared)).hu.shape == (24, 26, 16)


@pytest.mark.parametrize(
    ("stored", "flagged"),
    [
        (chest(), False),
        (chest() + 1024, True),  # raw values
        (np.maximum(chest() - 1024, -1024), True),  # rescaled twice
        (np.clip((chest() + 1000) / 6, 0, 255).astype(np.uint8), True),  # 8-bit export
        (np.random.default_rng(0).integers(0, 118, (9, 9, 9)).astype(np.uint8), True),  # label map
        (np.random.default_rng(0).gamma(2, 150, (9, 9, 9)).astype(np.int16), True),  # MR
        (np.maximum(chest(), -150), False),  # a crop without air or lung
    ],
)
def test_not_hu(stored, flagged):
    assert ("not_hu" in read(nifti(stored)).warnings) == flagged

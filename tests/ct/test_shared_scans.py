"""Real scans, each with its trap: every one ends as it should. The same behaviours are tested on files that the
tests make, in the other modules of this folder."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest

from mu2llm.ct import SPECS, Rejection, inspect, prepare, read

ENDS: list[tuple[str, str, set[str]]] = [  # path, reason or "ok", warnings
    ("totalseg/example_ct.nii.gz", "ok", {"padding_clipped"}),
    ("totalseg/example_ct_sm.nii.gz", "ok", {"padding_clipped"}),
    ("totalseg/pulmonary_ct_cropped.nii.gz", "ok", {"padding_clipped"}),
    ("totalseg/NEGATIVE_example_mr_sm.nii.gz", "ok", {"not_hu"}),
    ("totalseg/NEGATIVE_example_seg_labelmap.nii.gz", "ok", {"not_hu"}),
    ("totalseg_dicom", "ok", set()),
    ("ibsi/ibsi_1_ct_radiomics_phantom/nifti/image/phantom.nii.gz", "ok", set()),
    ("ibsi/ibsi_1_ct_radiomics_phantom/dicom/image", "ok", set()),
    ("dcm_qa_ct_GE", "ok", {"tilt_resampled", "gap_resampled", "padding_clipped", "oblique"}),
    ("monai_CT_DICOM", "slice_gap", set()),
    ("lungmask_dicom", "ok", {"no_modality", "padding_clipped"}),
    ("dcmqi_ct3slice", "ok", {"padding_clipped"}),
    ("rt-utils/mock_data", "ok", {"padding_clipped"}),
    ("rt-utils/one_slice_data", "single_slice", set()),
    ("rt-utils/oriented_data", "ok", {"oblique", "not_hu"}),
    ("niivue/shear.nii.gz", "ok", {"tilt_resampled", "forms_differ", "oblique"}),
    ("niivue/minimal.nii.gz", "unknown_orientation", set()),
    ("niivue/ct_perfusion_tests.nii.gz", "rgb", set()),
    ("niivue/NEGATIVE_4D_pcasl_MR.nii.gz", "not_3d", set()),
    ("niivue/NEGATIVE_complex_image.nii.gz", "complex", set()),
    ("niivue/low_res.nii.gz", "ok", {"not_hu"}),
    ("imlab_lungseg3d/Demo/id001-128x128x64.nii.gz", "ok", {"padding_clipped"}),
]
SYNTAXES = "cornerstone_transfer_syntaxes"


@pytest.mark.parametrize(("path", "end", "warnings"), ENDS, ids=[path for path, _, _ in ENDS])
def test_every_scan_ends_as_its_trap_says(shared, path, end, warnings):
    item = inspect(shared / "data" / "ct" / path)
    assert (item["reason"] or "ok", set(item["warnings"])) == (end, warnings)
    if end == "ok":
        assert item["hu_range"][0] >= -1024


def test_nifti_and_dicom_of_one_scan_are_the_same_volume(shared):
    root = shared / "data" / "ct" / "ibsi" / "ibsi_1_ct_radiomics_phantom"
    nifti, dicom = read(root / "nifti" / "image" / "phantom.nii.gz"), read(root / "dicom")
    np.testing.assert_array_equal(nifti.hu, dicom.hu)
    np.testing.assert_allclose(nifti.affine, dicom.affine, atol=1e-3)
    assert nifti.hu.shape == (204, 201, 60)
    assert nifti.sha256 == dicom.sha256


def test_24_orientations_are_one_array(shared):
    files = sorted((shared / "data" / "ct" / "niivue" / "nifti_space_48_orientations").glob("*.nii.gz"))
    volumes = [read(path) for path in files]
    assert len(volumes) == 24
    assert len({volume.sha256 for volume in volumes}) == 1
    assert [volume.stored_axes for volume in volumes] == [path.name[:3] for path in files]
    assert all(volume.warnings == ("not_hu",) for volume in volumes)
    expected = nib.as_closest_canonical(nib.load(files[0])).get_fdata()
    for volume in volumes:
        np.testing.assert_array_equal(volume.hu, volumes[0].hu)
        np.testing.assert_allclose(volume.affine, volumes[0].affine, atol=1e-3)
    np.testing.assert_allclose(volumes[0].hu, expected, atol=1e-4)


def test_values_are_those_of_the_file(shared):
    for name in ("example_ct", "example_ct_sm", "pulmonary_ct_cropped"):
        path = shared / "data" / "ct" / "totalseg" / f"{name}.nii.gz"
        expected = nib.as_closest_canonical(nib.load(path))
        volume = read(path)
        np.testing.assert_array_equal(volume.hu, np.maximum(expected.get_fdata(), -1024))
        np.testing.assert_allclose(volume.affine, expected.affine)


def test_a_jpeg_2000_series_has_its_spacing_from_positions(shared):
    volume = read(shared / "data" / "ct" / "totalseg_dicom")
    assert volume.hu.shape == (512, 512, 20)
    assert volume.spacing_mm == pytest.approx((0.9765625, 0.9765625, 2.0))


def test_a_tilted_head_stands_straight_on_equal_steps(shared):
    volume = read(shared / "data" / "ct" / "dcm_qa_ct_GE")
    axes = volume.affine[:3, :3] / volume.spacing_mm
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    assert volume.spacing_mm == pytest.approx((0.488, 0.488, 4.0), abs=0.01)
    # the skull is symmetrical from left to right in every slice only if none was shifted that way
    bone = (volume.hu > 300).sum(axis=(1, 2))
    assert abs(np.average(np.arange(512), weights=bone) - 255.5) < 25


def test_transfer_syntaxes_are_decoded_or_named(shared):
    folder = shared / "data" / "ct" / SYNTAXES
    for path in sorted(folder.glob("CTImage.dcm*")):
        item = inspect(path)
        undecodable = "4.53" in path.name
        assert item["reason"] == ("undecodable" if undecodable else "single_slice")
        assert ("1.2.840.10008.1.2.4.53" in item["message"]) == undecodable
    assert inspect(folder / "no-pixel-data.dcm")["reason"] == "other_modality"
    perfusion = inspect(folder / "CT0012.fragmented_no_bot_jpeg_baseline.51.dcm")
    assert (perfusion["status"], perfusion["shape"], perfusion["warnings"]) == ("ok", [512, 512, 2], ["not_hu"])


def test_unknown_orientation_can_be_accepted(shared):
    volume = read(shared / "data" / "ct" / "niivue" / "minimal.nii.gz", accept=["unknown_orientation"])
    assert volume.hu.shape == (64, 64, 10)
    assert "orientation_assumed" in volume.warnings


def test_a_real_scan_cut_anywhere_is_rejected(shared):
    data = (shared / "data" / "ct" / "totalseg" / "example_ct_sm.nii.gz").read_bytes()
    for keep in np.linspace(1, len(data) - 1, 12).astype(int):
        with pytest.raises(Rejection):
            read(data[:keep])
    plain = gzip.decompress(data)
    with pytest.raises(Rejection):
        read(plain[:-1])


def test_fewer_slices_than_a_chunk_leave_masked_chunks(shared):
    volume = read(shared / "data" / "ct" / "totalseg" / "example_ct_sm.nii.gz")
    made = prepare(volume, SPECS["reference"])
    np.testing.assert_array_equal(made.chunk_mask, [True] + [False] * 7)
    made = prepare(volume, SPECS["corrected"])
    assert 0 < made.chunk_mask.sum() < 8
    np.testing.assert_array_equal(made.voxels.any(axis=(1, 2, 3, 4)), made.chunk_mask)

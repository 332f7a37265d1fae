"""DICOM series: which files make the scan, in which order, on which grid."""

from __future__ import annotations

import io
import random
import zlib

import highdicom
import numpy as np
import pydicom
import pytest
from ct_scans import AFFINE, SERIES, chest, nifti, slices, to_bytes, zipped
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from mu2llm.ct import Rejection, read


def as_bytes(datasets: list[pydicom.Dataset], seed: int = 0) -> list[bytes]:
    """Files in no order at all."""
    files = [to_bytes(each) for each in datasets]
    random.Random(seed).shuffle(files)
    return files


def reason(datasets: list[pydicom.Dataset], **options: object) -> str:
    with pytest.raises(Rejection) as rejected:
        read(as_bytes(datasets), **options)  # type: ignore[arg-type]
    return rejected.value.reason


def test_series_equals_the_nifti_of_the_same_scan():
    volume, other = read(as_bytes(slices(chest()))), read(nifti(chest()))
    assert volume.sha256 == other.sha256
    np.testing.assert_allclose(volume.affine, other.affine, atol=1e-5)
    assert volume.spacing_mm == pytest.approx((2, 2.5, 3))  # not square, and not SliceThickness
    assert (volume.modality, volume.series, volume.stored_axes, volume.warnings) == ("CT", SERIES, "LPS", ())


def test_folder_zip_and_list_are_the_same(tmp_path):
    files = as_bytes(slices(chest()))
    for index, data in enumerate(files):
        (tmp_path / f"IM{index}").write_bytes(data)  # no suffix
    archive = tmp_path.with_suffix(".zip")
    archive.write_bytes(zipped({f"study/IM{index}": data for index, data in enumerate(files)}))
    expected = read(files).sha256
    assert read(tmp_path).sha256 == read(archive).sha256 == read(archive.read_bytes()).sha256 == expected


def test_upside_down_and_coronal_series_are_turned():
    for axes in ([0, 1, 2], [0, 2, 1], [2, 1, 0]):
        affine = AFFINE[:, [*axes, 3]]
        if np.linalg.det(affine[:3, :3]) < 0:
            affine = affine @ np.diag([1, 1, -1, 1])
        volume = read(as_bytes(slices(chest(), affine)))
        expected = read(nifti(chest(), affine))
        assert volume.sha256 == expected.sha256
        np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)


def test_scaling_is_each_files_own():
    datasets = slices(chest())
    for each in datasets[::2]:
        stored = np.frombuffer(each.PixelData, "<i2")
        each.PixelData, each.RescaleIntercept = (stored + 1024).astype("<i2").tobytes(), -2048
    np.testing.assert_array_equal(read(as_bytes(datasets)).hu, chest())


@pytest.mark.parametrize("signed", [True, False])
def test_padding_value_is_air_even_in_tissue_range(signed):
    datasets = slices(chest(), PixelRepresentation=int(signed))
    for each in datasets:
        pixels = np.frombuffer(each.PixelData, "<i2").reshape(each.Rows, each.Columns).copy()
        pixels[:3] = 1000  # −24 HU
        each.PixelData = pixels.tobytes()
        each.add_new("PixelPaddingValue", "SS" if signed else "US", 1000)
    volume = read(as_bytes(datasets))
    assert (volume.hu[:, -3:] == -1024).all()
    assert "padding_clipped" in volume.warnings


def test_a_range_of_padding_values_is_air():
    datasets = slices(chest())
    for each in datasets:
        pixels = np.frombuffer(each.PixelData, "<i2").reshape(each.Rows, each.Columns).copy()
        pixels[:2], pixels[2] = 3000, 3010
        each.PixelData = pixels.tobytes()
        each.add_new("PixelPaddingValue", "SS", 3000)
        each.add_new("PixelPaddingRangeLimit", "SS", 3010)
    volume = read(as_bytes(datasets))
    assert (volume.hu[:, -3:] == -1024).all() and volume.hu.max() < 500


def test_declared_padding_that_is_written_unsigned():
    datasets = slices(chest())
    for each in datasets:
        pixels = np.frombuffer(each.PixelData, "<i2").reshape(each.Rows, each.Columns).copy()
        pixels[:3] = -2000
        each.PixelData = pixels.tobytes()
        each.add_new("PixelPaddingValue", "US", 2**16 - 2000)
    assert (read(as_bytes(datasets)).hu[:, -3:] == -1024).all()


def test_gantry_tilt_is_straightened():
    tilted = AFFINE.copy()
    tilted[1, 2] = 1.0
    volume = read(as_bytes(slices(chest(), tilted)))
    expected = read(nifti(chest(), tilted))
    assert "tilt_resampled" in volume.warnings
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)
    np.testing.assert_allclose(volume.hu, expected.hu, atol=1)
    place = np.linalg.inv(volume.affine) @ tilted @ [12, 4, 8, 1]  # the spine, which is still where it was
    assert volume.hu[tuple(np.rint(place[:3]).astype(int))] > 200


def test_unequal_gaps_are_evened():
    """HU that rise linearly with z stay that function of z."""
    positions = np.array([0, 2, 4, 6, 7, 10, 13, 16.0])
    hu = np.broadcast_to(-900 + positions * 50, (6, 5, 8))
    volume = read(as_bytes(slices(hu, positions=positions)))
    assert "gap_resampled" in volume.warnings
    z = np.arange(volume.hu.shape[2]) * volume.spacing_mm[2]
    np.testing.assert_allclose(volume.hu[3, 3], -900 + z * 50, atol=1)
    assert z[-1] == pytest.approx(16)


def test_a_missing_slice_is_filled_and_said():
    datasets = slices(chest())
    del datasets[5]
    volume = read(as_bytes(datasets))
    assert volume.warnings == ("gap_resampled",)
    assert volume.hu.shape == chest().shape
    np.testing.assert_array_equal(np.delete(volume.hu, 5, axis=2), np.delete(chest(), 5, axis=2))


def test_rounded_positions_are_no_gaps():
    positions = np.round(np.arange(16) * 0.6667, 2)
    assert read(as_bytes(slices(chest(), positions=positions))).warnings == ()


def test_copies_are_dropped():
    datasets = slices(chest())
    volume = read(as_bytes([*datasets, *datasets[:4]]))
    assert volume.warnings == ("duplicates_dropped",)
    np.testing.assert_array_equal(volume.hu, chest())


def test_other_things_in_the_folder_are_set_aside():
    datasets = slices(chest())
    localiser = slices(chest((40, 40, 2)), SeriesInstanceUID="1.9", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    coronal = slices(chest((30, 30, 30)), AFFINE[:, [0, 2, 1, 3]], SeriesInstanceUID="1.8")
    capture = slices(chest((64, 64, 2)), SOPClassUID=SecondaryCaptureImageStorage, SeriesInstanceUID="1.7")
    small = slices(chest((8, 8, 4)), SeriesInstanceUID="1.6", SeriesDescription="thick")
    mr = slices(chest((40, 40, 40)), Modality="MR", SOPClassUID=MRImageStorage, SeriesInstanceUID="1.5")
    everything = [*datasets, *localiser, *coronal, *capture, *small, *mr]
    volume = read([*as_bytes(everything), b"a note", b""])
    assert volume.series == SERIES
    assert volume.warnings == ("files_set_aside", "unreadable_files")
    np.testing.assert_array_equal(volume.hu, chest())
    assert read(as_bytes(everything), series="1.6").hu.shape == (8, 8, 4)
    assert read(as_bytes(everything), series="thick").hu.shape == (8, 8, 4)
    assert reason(everything, series="1.5") == "other_modality"
    assert reason(everything, series="1.4") == "no_series"


def test_jitter_of_directions_and_spacing_does_not_split_a_series():
    datasets = slices(chest())
    for index, each in enumerate(datasets):
        off = 0.0049999 if index % 2 else 0.0050001
        each.ImageOrientationPatient = [1, off, 0, -off, 1, 0]
        each.PixelSpacing = [2.5, 2.0004999 if index % 2 else 2.0005001]
    assert read(as_bytes(datasets)).hu.shape == chest().shape


def test_of_two_phases_in_one_series_the_larger_is_taken():
    first, second = slices(chest(), AcquisitionNumber=1), slices(chest(seed=1)[..., :10], AcquisitionNumber=2)
    for index, each in enumerate(second):
        each.SOPInstanceUID = f"1.9.{index}"
    volume = read(as_bytes([*first, *second]))
    assert volume.warnings == ("partial",)
    np.testing.assert_array_equal(volume.hu, chest())
    for each in (*first, *second):
        del each.AcquisitionNumber
    assert reason([*first, *second]) == "duplicate_positions"


def test_no_modality_is_said():
    assert read(as_bytes(slices(chest(), Modality=None))).warnings == ("no_modality",)


def test_no_rescale_is_said():
    volume = read(as_bytes(slices(chest(), scaling=(1, 0), RescaleSlope=None, RescaleIntercept=None)))
    assert volume.warnings == ("no_rescale",)
    np.testing.assert_array_equal(volume.hu, chest())


def test_unknown_orientation_is_rejected_or_accepted_on_request():
    datasets = slices(chest(), ImageOrientationPatient=None)
    assert reason(datasets) == "unknown_orientation"
    volume = read(as_bytes(datasets), accept=["unknown_orientation"])
    assert volume.warnings == ("orientation_assumed",)
    np.testing.assert_array_equal(volume.hu, chest())


def test_oblique_series_keep_their_voxels():
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    volume = read(as_bytes(slices(chest(), turn @ AFFINE)))
    assert volume.warnings == ("oblique",)
    np.testing.assert_array_equal(volume.hu, chest())
    np.testing.assert_allclose(volume.affine, turn @ AFFINE, atol=1e-4)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_transfer_syntaxes(syntax):
    hu = chest((64, 48, 5))
    datasets = slices(hu)
    for each in datasets:
        each.compress(syntax, generate_instance_uid=False)
    np.testing.assert_array_equal(read(as_bytes(datasets)).hu, hu)


def test_implicit_without_preamble_and_deflated():
    files = []
    for each in slices(chest()):
        stream = io.BytesIO()
        del each.file_meta
        pydicom.dcmwrite(stream, each, implicit_vr=True, little_endian=True)
        assert stream.getvalue()[:2] == b"\x08\0"
        files.append(stream.getvalue())
    np.testing.assert_array_equal(read(files).hu, chest())
    datasets = slices(chest())
    for each in datasets:
        each.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    np.testing.assert_array_equal(read(as_bytes(datasets)).hu, chest())


def test_a_deflate_bomb_is_refused(monkeypatch):
    monkeypatch.setattr("mu2llm.ct.dicom_headers.MAX_BYTES", 2**20)
    dataset = slices(chest())[0]
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    head = to_bytes(dataset)
    start = head.index(b"\x02\0\x10\0UI") + 8
    start += int.from_bytes(head[start - 2 : start], "little")
    while head[start : start + 2] == b"\x02\0":  # the rest of the meta information
        start += 8 + int.from_bytes(head[start + 6 : start + 8], "little")
    squeeze = zlib.compressobj(wbits=-15)
    bomb = head[:start] + squeeze.compress(b"\x08\0\x05\0CS\0\0" + b"\0" * 2**22) + squeeze.flush()
    with pytest.raises(Rejection) as rejected:
        read(bomb)
    assert rejected.value.reason == "too_large"


def test_numbers_are_read_whatever_their_vr_or_decimal_sign():
    expected = read(as_bytes(slices(chest())))
    for name, text in {
        "PixelSpacing": "2.5\\2",
        "ImagePositionPatient": None,
        "RescaleIntercept": "-1024",
        "ImageOrientationPatient": "1\\0\\0\\0\\1\\0",
    }.items():
        for vr, sign in [("UT", "."), ("LO", "."), ("UT", ","), ("ST", ","), ("UN", "."), ("DS", ",")]:
            datasets = slices(chest())
            for each in datasets:
                value = (text or "\\".join(map(str, each[name].value))).replace(".", sign)
                tag = pydicom.tag.Tag(name)
                raw = value.encode() + b" " * (len(value) % 2)
                each[name] = pydicom.dataelem.RawDataElement(tag, vr, len(raw), raw, 0, False, True)
            volume = read(as_bytes(datasets))
            assert volume.sha256 == expected.sha256 and volume.spacing_mm == expected.spacing_mm, (name, vr, sign)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PixelSpacing", b"abc "),
        ("PixelSpacing", b"1.5 "),
        ("ImagePositionPatient", b"1\\2 "),
        ("RescaleSlope", b"1e9999"),
    ],
)
def test_a_tag_that_cannot_be_read_is_named(name, value):
    datasets = slices(chest())
    for each in datasets:
        raw = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(name), "DS", len(value), value, 0, False, True)
        each[name] = raw
    with pytest.raises(Rejection, match=name) as rejected:
        read(as_bytes(datasets))
    assert rejected.value.reason == "corrupt" and value.decode().strip() in rejected.value.message.replace("\\\\", "\\")


def test_rle_segments_with_more_bytes_than_pixels():
    datasets = slices(chest((25, 21, 6)))
    for each in datasets:
        each.compress(RLELossless, generate_instance_uid=False)
        frame = pydicom.encaps.get_frame(each.PixelData, 0, number_of_frames=1)
        starts = [int.from_bytes(frame[4 * n : 4 * n + 4], "little") for n in (1, 2)]
        high = frame[starts[0] : starts[1]] + b"\0\7\0\7"  # two literal bytes more
        header = b"".join(n.to_bytes(4, "little") for n in (2, 64, 64 + len(high), *[0] * 13))
        each.PixelData = pydicom.encaps.encapsulate([header + high + frame[starts[1] :] + b"\0\7"])
    np.testing.assert_array_equal(read(as_bytes(datasets)).hu, chest((25, 21, 6)))


@pytest.mark.parametrize("slope", ["", None])
def test_a_slope_that_is_not_given_is_one(slope):
    volume = read(as_bytes(slices(chest(), RescaleSlope=slope)))
    np.testing.assert_array_equal(volume.hu, chest())
    assert volume.warnings == ("no_rescale",)


def test_many_voxels_are_refused(monkeypatch):
    monkeypatch.setattr("mu2llm.ct.dicom_pixels.MAX_VOXELS", 24 * 20 * 16 - 1)
    assert reason(slices(chest())) == "too_large"


def test_an_unknown_transfer_syntax_is_named():
    datasets = slices(chest())
    for each in datasets:
        each.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.53"
        each.PixelData = pydicom.encaps.encapsulate([each.PixelData])
    for given in (datasets, datasets[:1]):
        with pytest.raises(Rejection, match=r"1\.2\.840\.10008\.1\.2\.4\.53") as rejected:
            read(as_bytes(given))
        assert rejected.value.reason == "undecodable"


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"Modality": "MR"}, "other_modality"),
        ({"Modality": "PT"}, "other_modality"),
        ({"Modality": "SEG"}, "other_modality"),
        ({"Modality": None, "SOPClassUID": MRImageStorage}, "other_modality"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "rgb"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "rgb"),
        ({"Rows": None, "Columns": None, "PixelData": None}, "no_images"),
        ({"PixelData": None}, "corrupt"),
        ({"ImagePositionPatient": None}, "no_positions"),
        ({"PixelSpacing": None}, "no_positions"),
        ({"ImagePositionPatient": [0, 0, 0]}, "duplicate_positions"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "bad_geometry"),
        ({"PixelSpacing": [1e-6, 1]}, "bad_geometry"),
        ({"RescaleSlope": "1e400"}, "corrupt"),
    ],
)
def test_what_is_no_scan_is_rejected(tags, expected):
    assert reason(slices(chest(), **tags)) == expected


def test_one_slice_alone_is_rejected():
    assert reason(slices(chest())[:1]) == "single_slice"
    with pytest.raises(Rejection, match="copies"):
        read([to_bytes(slices(chest())[0])] * 3)


def test_a_gap_that_nobody_can_fill_is_rejected():
    assert reason(slices(chest()[..., :4], positions=np.array([0, 202.5, 203.75, 205]))) == "slice_gap"
    assert reason(slices(chest()[..., :2], positions=np.array([0, 202.0]))) == "slice_gap"


def test_slices_off_the_line_are_rejected():
    datasets = slices(chest())
    datasets[7].ImagePositionPatient = [datasets[7].ImagePositionPatient[0] + 20, *datasets[7].ImagePositionPatient[1:]]
    assert reason(datasets) == "irregular_positions"


def test_a_truncated_slice_is_rejected():
    files = as_bytes(slices(chest()))
    files[3] = files[3][:-100]
    with pytest.raises(Rejection) as rejected:
        read(files)
    assert rejected.value.reason == "corrupt"


def test_enhanced_multi_frame():
    datasets = slices(chest(), InstitutionName="", PatientID="", PatientName="", PatientBirthDate="", PatientSex="")
    for each in datasets:
        for name in ("AccessionNumber", "StudyDate", "StudyTime", "StudyID", "ReferringPhysicianName"):
            setattr(each, name, "")
        each.PositionReferenceIndicator = each.Manufacturer = ""
        each.SeriesNumber = 1
        each.AcquisitionNumber = 1
    frames = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        datasets,
        series_instance_uid="1.2.3.4",
        series_number=2,
        sop_instance_uid="1.2.3.4.5",
        instance_number=1,
    )
    volume = read(to_bytes(frames))
    np.testing.assert_array_equal(volume.hu, chest())
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
    for group in frames.PerFrameFunctionalGroupsSequence:
        del group.PlanePositionSequence
    with pytest.raises(Rejection) as rejected:
        read(to_bytes(frames))
    assert rejected.value.reason == "enhanced_unreadable"

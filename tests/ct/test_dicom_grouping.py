"""What belongs together: scans of one series are told apart by what the files say, then by geometry; parts of one
scan are joined, and where not all is used it is said."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from ct_scans import AFFINE, SERIES, chest, enhanced, moved, slices, to_bytes
from pydicom.dataset import Dataset

from mu2llm.ct import CTVolume, Rejection, read

FIRST, SECOND = chest(), chest(seed=1)


def read_all(datasets: list[Dataset], **options: Any) -> CTVolume:
    """Files in no order at all."""
    files = [to_bytes(each) for each in datasets]
    random.Random(0).shuffle(files)
    return read(files, **options)


def rejected(datasets: list[Dataset], **options: Any) -> Rejection:
    with pytest.raises(Rejection) as caught:
        read_all(datasets, **options)
    return caught.value


def numbered(datasets: list[Dataset], name: str, values: list[Any]) -> list[Dataset]:
    for each, value in zip(datasets, values, strict=True):
        setattr(each, name, value)
    return datasets


TELLING = [
    {"AcquisitionNumber": "{n}"},
    {"AcquisitionTime": "1200{n}0"},
    {"AcquisitionDateTime": "202001011200{n}0"},
    {"ContentTime": "1200{n}0.5"},
    {"TemporalPositionIdentifier": "{n}"},
    {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "PHASE {n}"]},
    {"ConvolutionKernel": "B{n}0f"},
    {"KVP": "{n}0"},
    {"EchoNumbers": "{n}"},
    {"NominalPercentageOfCardiacPhase": 30, "SeriesNumber": "{n}"},
    {"TriggerTime": "{n}00"},
    {"SliceThickness": "{n}"},
    {"StackID": "{n}"},
    {"StudyInstanceUID": "1.2.{n}"},
    {"FrameOfReferenceUID": "1.2.{n}"},
]


def told(tags: dict[str, Any], n: int) -> dict[str, Any]:
    def fill(value: Any) -> Any:
        return [fill(each) for each in value] if isinstance(value, list) else str(value).format(n=n)

    return {name: value if isinstance(value, int) else fill(value) for name, value in tags.items()}


@pytest.mark.parametrize("offset", [0, 0.004, 0.015, 0.3, 1.5, -1.5, 1, 4.5, 6])
@pytest.mark.parametrize("tags", TELLING, ids=lambda tags: "-".join(tags))
def test_scans_of_one_region_are_never_one_volume(tags, offset):
    volume = read_all([*slices(FIRST, **told(tags, 1)), *moved(SECOND, offset, **told(tags, 2))])
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ("partial",)
    assert volume.spacing_mm == pytest.approx((2, 2.5, 3))


@pytest.mark.parametrize("name", ["AcquisitionTime", "ContentTime", "AcquisitionNumber"])
@pytest.mark.parametrize("offset", [0, 1.5, -1.5])
def test_sweeps_whose_every_slice_has_its_own_value_are_told_apart(name, offset):
    values = range(100000, 100032)
    datasets = numbered([*slices(FIRST), *moved(SECOND, offset)], name, [str(value) for value in values])
    volume = read_all(datasets)
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ("partial",)


def test_three_time_points_of_two_stations_each():
    datasets = []
    for time, (lower, upper) in enumerate([(1, 2), (3, 4), (5, 6)]):
        scan = slices(chest(seed=time))
        datasets += numbered(scan, "AcquisitionNumber", [lower] * 8 + [upper] * 8)
    volume = read_all(datasets)
    np.testing.assert_array_equal(volume.hu, chest(seed=0))
    assert volume.warnings == ("partial",)


@pytest.mark.parametrize("offset", [0.3, 1, 1.2])
def test_two_regular_grids_are_two_volumes_though_no_tag_says_so(offset):
    volume = read_all([*slices(FIRST), *moved(SECOND[..., :12], offset)])
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ("partial",)


def test_slices_at_one_place_that_nothing_tells_apart_are_rejected():
    for offset in (0, 0.005, 0.015):
        affine = np.diag([1, 1, 10 / 3, 1]) @ AFFINE
        second = affine.copy()
        second[2, 3] += offset
        found = rejected([*slices(FIRST, affine), *slices(SECOND, second)])
        assert found.reason == "duplicate_positions"
        assert "copies" not in found.message


def test_unequal_steps_do_not_multiply_the_slices():
    places = np.cumsum([0, *[0.5] * 8, *[4.0] * 7])
    found = rejected(slices(FIRST, positions=places))
    assert found.reason == "irregular_positions" and "16 slices" in found.message


@pytest.mark.parametrize("kind", ["MIP", "MINIP", "AVERAGE"])
@pytest.mark.parametrize("count", [5, 16, 40])
def test_projections_are_no_slices_of_the_scan(kind, count):
    places = np.linspace(1, 44, count)
    slabs = slices(chest((24, 20, count)), positions=places, ImageType=["DERIVED", "SECONDARY", "AXIAL", kind])
    volume = read_all([*slices(FIRST), *slabs])
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ("files_set_aside",)
    np.testing.assert_array_equal(read_all(slabs).hu.shape[2], count)  # alone they can be read


def test_derived_slabs_are_not_mixed_with_original_slices_nor_taken_for_them():
    slabs = slices(
        chest((24, 20, 40)), positions=np.linspace(1, 44, 40), ImageType=["DERIVED", "SECONDARY", "REFORMAT"]
    )
    volume = read_all([*slices(FIRST), *slabs])
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ("partial",)


def test_two_breath_holds_that_overlap_are_not_interpolated_into_each_other():
    lower = slices(FIRST, AcquisitionNumber=1)
    volume = read_all([*lower, *moved(SECOND[..., :12], 16 * 3 - 7, AcquisitionNumber=2)])
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ("partial",)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 1, 3)])
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("off", [0, 0.04])
def test_stations_that_follow_one_another_are_one_scan(order, shared, off):
    scan, other = slices(FIRST), slices(SECOND)
    parts = [scan[:6], other[6 - shared : 6] + scan[6:11], other[11 - shared : 11] + scan[11:]]
    datasets = [
        each
        for n, part in zip(order, parts, strict=True)
        for each in numbered(part, "AcquisitionNumber", [n] * len(part))
    ]
    for each in parts[1]:
        each.ImagePositionPatient = [*each.ImagePositionPatient[:2], float(each.ImagePositionPatient[2]) + off]
    volume = read_all(datasets)
    assert volume.hu.shape == FIRST.shape
    assert volume.warnings == (("stations_joined",) if shared else ())
    for z in range(16):
        assert any((volume.hu[..., z] == hu[..., z]).all() for hu in (FIRST, SECOND))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("AcquisitionNumber", [n // 4 for n in range(16)]),  # step and shoot
        ("AcquisitionNumber", list(range(16))),
        ("AcquisitionTime", [f"1200{n // 4:02d}" for n in range(16)]),
        ("ContentTime", [f"1200{n:02d}" for n in (3, 1, 0, 2, 7, 5, 6, 4, 9, 11, 8, 10, 15, 12, 14, 13)]),
        ("ContentTime", ["120001" if n in (0, 1, 3, 4, 8) else "120002" for n in range(16)]),
        ("SliceThickness", [1 + n % 3 / 1000 for n in range(16)]),
        ("KVP", [120 if n < 9 else 100 for n in range(16)]),
        ("ConvolutionKernel", ["B30f" if n < 5 else "B31f" for n in range(16)]),
        ("FrameOfReferenceUID", [f"1.2.{n * 7919 % 101}" for n in range(16)]),
        ("StudyInstanceUID", [f"1.2.{n * 7919 % 101}" for n in range(16)]),
        ("SOPInstanceUID", ["1.2.3"] * 16),
        ("ImageType", [["ORIGINAL", "PRIMARY", "AXIAL", "A" if n in (2, 3, 7, 12) else "B"] for n in range(16)]),
    ],
)
def test_what_changes_within_a_scan_does_not_divide_it(name, values):
    volume = read_all(numbered(slices(FIRST), name, values))
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ()


def test_equal_instance_uids_are_copies_only_if_the_pixels_are():
    both = [*slices(FIRST, AcquisitionTime="120010"), *slices(SECOND, AcquisitionTime="120050")]
    volume = read_all(numbered(both, "SOPInstanceUID", ["1.2.3"] * 32))
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ("partial",)
    assert rejected(numbered([*slices(FIRST), *slices(SECOND)], "SOPInstanceUID", ["1.2.3"] * 32)).reason == (
        "duplicate_positions"
    )


def test_copies_are_dropped_whatever_their_tags_and_encoding():
    scan, again = slices(FIRST), slices(FIRST, AcquisitionTime="120050")
    numbered(again, "SOPInstanceUID", [f"1.9.{n}" for n in range(16)])
    assert read_all([*scan, *again]).warnings == ("duplicates_dropped",)
    packed = slices(FIRST)
    for each in packed:
        each.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    volume = read_all([*scan, *packed])
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ("duplicates_dropped",)


def test_equal_pixels_with_another_scaling_are_no_copies():
    scan, other = slices(FIRST), slices(FIRST)
    for each in other:
        each.RescaleIntercept = -1000
    assert rejected([*scan, *other]).reason == "duplicate_positions"


@pytest.mark.parametrize(
    "change", [{"PixelSpacing": [2.2, 1.8]}, {"ImageOrientationPatient": [1, 0, 0, 0, 0.94, 0.34]}]
)
def test_half_of_a_series_on_another_grid_is_not_taken_for_the_whole(change):
    datasets = slices(FIRST)
    for each in datasets[8:]:
        for name, value in change.items():
            setattr(each, name, value)
    assert rejected(datasets).reason == "mixed_grids"


def test_half_of_a_series_with_another_matrix_is_not_taken_for_the_whole():
    lower, upper = slices(FIRST[..., :8]), moved(chest((30, 26, 8)), 24)
    found = rejected([*lower, *upper])
    assert found.reason == "mixed_grids" and "30" in found.message and "24" in found.message


def test_of_two_reconstructions_of_one_region_the_larger_is_taken():
    zoomed = slices(chest((24, 20, 16), 1))
    for each in zoomed:
        each.PixelSpacing = [1.2, 1.0]
    volume = read_all([*zoomed, *slices(FIRST)])
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ("partial",)


def phases() -> list[Dataset]:
    early = slices(FIRST, AcquisitionNumber=1)
    return [*moved(SECOND, 1.5, AcquisitionNumber=2, SeriesDescription="late"), *early]


@pytest.mark.parametrize(("number", "hu"), [(1, FIRST), (2, SECOND)])
def test_a_scan_that_was_not_read_is_named_and_read_by_its_name(number, hu):
    volume = read_all(phases(), series=f"{SERIES}#{number}")
    np.testing.assert_array_equal(volume.hu, hu)
    ((name, told),) = volume.others.items()
    assert name == f"{SERIES}#{3 - number}" and volume.warnings == ("partial",)
    assert told.startswith("16 slices from") and f"AcquisitionNumber {3 - number}" in told
    assert "late" not in told or number == 1


@pytest.mark.parametrize("order", range(4))
def test_the_names_of_scans_do_not_depend_on_the_order_of_files(order):
    zoomed = slices(SECOND)
    for each in zoomed:
        each.PixelSpacing = [1.2, 1.0]
    datasets = [*zoomed, *slices(FIRST)]
    random.Random(order).shuffle(datasets)
    volume = read([to_bytes(each) for each in datasets], series=f"{SERIES}#1")
    np.testing.assert_array_equal(volume.hu, SECOND)
    assert list(volume.others) == [f"{SERIES}#2"]


def test_other_series_are_named_too():
    volume = read_all([*phases(), *slices(FIRST[..., :12], SeriesInstanceUID="1.9", SeriesDescription="thin")])
    assert set(volume.others) == {f"{SERIES}#2", "1.9"} and "thin" in volume.others["1.9"]


@pytest.mark.parametrize("asked", [f"{SERIES}#3", f"{SERIES}#x", "#1", f"{SERIES}#"])
def test_a_scan_that_is_not_there_is_said(asked):
    assert rejected(phases(), series=asked).reason == "no_series"


def test_a_description_may_have_such_a_sign():
    datasets = slices(FIRST, SeriesDescription="recon #2")
    np.testing.assert_array_equal(read_all(datasets, series="recon #2").hu, FIRST)


def test_halves_on_two_grids_can_be_read_each():
    datasets = slices(FIRST)
    for each in datasets[8:]:
        each.PixelSpacing = [2.2, 1.8]
    assert f"{SERIES}#" in rejected(datasets).message
    shapes = {read_all(datasets, series=f"{SERIES}#{number}").hu.shape for number in (1, 2)}
    assert shapes == {(24, 20, 8)}


def test_series_uids_of_their_own_are_said_and_joined_on_request():
    datasets = numbered(slices(FIRST), "SeriesInstanceUID", [f"1.9.{n * 7919 % 101}" for n in range(16)])
    scout = slices(chest((40, 40, 2)), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesInstanceUID="1.8")
    found = rejected([*datasets, *scout])
    assert found.reason == "series_per_slice" and "16 slices" in found.message and "series" in found.message
    volume = read_all([*datasets, *scout], accept=["series_per_slice"])
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ("series_joined", "files_set_aside")


def test_two_series_are_still_two():
    other = slices(SECOND[..., :12], SeriesInstanceUID="1.9")
    volume = read_all([*slices(FIRST), *other])
    assert (volume.series, volume.warnings) == (SERIES, ("files_set_aside",))


@pytest.mark.parametrize(
    ("step", "digits"), [(1.25, 1), (0.625, 1), (3.75, 0), (0.7, 1), (1 / 3, 2), (0.6667, 2), (5.05, 1)]
)
@pytest.mark.parametrize("start", [0, -1037.4])
def test_rounded_places_are_no_gaps(step, digits, start):
    hu = chest((24, 20, 40))
    places = np.round(start + np.arange(40) * step, digits)
    volume = read_all(slices(hu, positions=places))
    assert volume.warnings == ()
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.spacing_mm[2] == pytest.approx(step, abs=10.0**-digits / 20)


@pytest.mark.parametrize("missing", [1, 5, 20, 38])
@pytest.mark.parametrize("step", [0.7, 1.25, 5])
def test_a_missing_slice_is_no_rounding(missing, step):
    places = np.delete(np.round(np.arange(40) * step, 1), missing)
    volume = read_all(slices(chest((24, 20, 39)), positions=places))
    assert volume.warnings == ("gap_resampled",) and volume.hu.shape[2] == 40


def test_files_of_several_frames_each_are_one_scan():
    scan = slices(FIRST)
    datasets = [enhanced(scan[n : n + 5], SOPInstanceUID=f"1.9.{n}") for n in range(0, 16, 5)]
    volume = read_all(datasets)
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ()
    volume = read_all([*datasets, enhanced(slices(SECOND[..., :7]), SOPInstanceUID="1.9.99", AcquisitionNumber=2)])
    np.testing.assert_array_equal(volume.hu, FIRST)
    assert volume.warnings == ("partial",)


def test_a_multi_frame_file_of_each_phase_tells_them_apart():
    for offset in (0, 1.5):
        files = [
            enhanced(slices(FIRST), SOPInstanceUID="1.9.1"),
            enhanced(moved(SECOND, offset), SOPInstanceUID="1.9.2"),
        ]
        volume = read_all(files)
        np.testing.assert_array_equal(volume.hu, FIRST)
        assert volume.warnings == ("partial",)

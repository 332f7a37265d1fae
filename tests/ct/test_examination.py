"""The series of an examination that lie in one place: which are read together, and in which order."""

import random

import numpy as np
import pytest
from ct_scans import SERIES, chest, nifti, slices, to_bytes, zipped

from mu2llm.ct import Rejection, read, read_several

MAIN, SOFT, SHORTER = chest(), chest((24, 20, 18), 1), chest((24, 20, 14), 2)


def series(hu, name, **tags):
    return slices(hu, SeriesInstanceUID=name, **tags)


def study():
    """Three series that are alike, and what is not read with them."""
    coronal = np.array([[2.0, 0, 0, 0], [0, 0, 3.0, 0], [0, 2.5, 0, 0], [0, 0, 0, 1]])
    return [
        *series(MAIN, "1.1"),
        *series(SOFT, "1.2"),
        *series(SHORTER, "1.3"),
        *series(chest((24, 20, 7)), "1.4"),  # less than half as long, as a bolus is tracked
        *series(chest((24, 20, 40)), "1.5", StudyInstanceUID="1.9"),
        *series(chest((24, 20, 40)), "1.6", ImageType=["DERIVED", "SECONDARY", "MIP"]),
        *series(chest((24, 20, 40)), "1.7", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        *series(chest((24, 20, 40)), "1.8", Modality="PT"),
        *slices(chest((60, 60, 40)), coronal, SeriesInstanceUID="1.10"),
    ]


def files(datasets):
    shuffled = [to_bytes(each) for each in datasets]
    random.Random(0).shuffle(shuffled)
    return shuffled


def of_one_study():
    return [each for each in study() if each.StudyInstanceUID != "1.9"]


def test_the_largest_axial_ones_of_the_study_are_read_the_first_as_it_is_alone():
    given = files(of_one_study())
    found = read_several(given, 5)
    assert [volume.series for volume in found] == ["1.2", "1.1", "1.3"]
    for volume, hu in zip(found, (SOFT, MAIN, SHORTER), strict=True):
        np.testing.assert_array_equal(volume.hu, hu)
    alone = read(given)
    assert (found[0].sha256, found[0].warnings) == (alone.sha256, alone.warnings) and alone.series == "1.2"
    assert [volume.series for volume in read_several(given, 2)] == ["1.2", "1.1"]
    assert [volume.series for volume in read_several(given, 1)] == ["1.2"]


def test_another_study_in_the_same_place_is_not_read_with_it():
    assert [volume.series for volume in read_several(files(study()), 5)] == ["1.5"]


def test_where_all_is_read_nothing_is_said_to_be_set_aside():
    both = [*series(MAIN, "1.1"), *series(SOFT, "1.2")]
    assert [volume.warnings for volume in read_several(files(both), 2)] == [(), ()]
    assert [volume.warnings for volume in read_several(files(both), 1)] == [("files_set_aside",)]


def test_one_that_cannot_be_used_is_passed_over_and_said():
    broken = series(chest((24, 20, 17)), "1.2")
    for each in broken:
        each.PixelData = each.PixelData[: len(each.PixelData) // 2]
    found = read_several(files([*series(SOFT, "1.1"), *broken, *series(SHORTER, "1.3")]), 2)
    assert [volume.series for volume in found] == ["1.1", "1.3"]
    assert set(found[0].warnings) == {"series_unusable", "files_set_aside"} and found[1].warnings == ()
    with pytest.raises(Rejection):
        read_several(files([*broken, *series(SHORTER, "1.3")]), 2)


def test_one_whose_values_are_no_hu_is_none_of_them():
    mask = series((SHORTER > 0).astype(np.int16), "1.2")
    given = files([*series(MAIN, "1.1"), *mask])
    assert len(read_several(given, 2)) == 1 and len(read_several(given, 2, accept=["not_hu"])) == 2


def test_series_of_one_slice_each_are_one_scan():
    datasets = slices(MAIN)
    for number, each in enumerate(datasets):
        each.SeriesInstanceUID = f"1.9.{number}"
    (volume,) = read_several(files(datasets), 2, accept=["series_per_slice"])
    assert volume.warnings == ("series_joined",)
    np.testing.assert_array_equal(volume.hu, MAIN)


def test_a_folder_a_zip_and_what_is_no_dicom(tmp_path):
    named = {f"{number}.dcm": to_bytes(each) for number, each in enumerate([*slices(MAIN), *series(SOFT, "1.2")])}
    for name, data in named.items():
        (tmp_path / name).write_bytes(data)
    for source in (str(tmp_path), zipped(named)):
        assert [volume.series for volume in read_several(source, 2)] == ["1.2", SERIES]
    (volume,) = read_several(nifti(MAIN), 2, rescale=(1, 0))
    assert volume.sha256 == read(nifti(MAIN)).sha256

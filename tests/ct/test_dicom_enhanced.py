"""Enhanced multi-frame objects give what classic slices of the same scan give."""

from __future__ import annotations

import numpy as np
import pytest
from ct_scans import AFFINE, FRAME_TAGS, chest, enhanced, moved, slices, to_bytes
from pydicom.dataset import Dataset

from mu2llm.ct import SPECS, Rejection, prepare, read

HU = chest()
DIMENSION = {"StackID": 0x00209056, "InStackPositionNumber": 0x00209057, "TemporalPositionIndex": 0x00209128}

TELLING = [
    "TemporalPositionIndex",
    "StackID",
    "FrameAcquisitionNumber",
    "FrameReferenceDateTime",
    "FrameAcquisitionDateTime",
    "DimensionIndexValues",
]


def dimensions(*names: str) -> list[Dataset]:
    items = []
    for name in names:
        items.append(Dataset())
        items[-1].DimensionIndexPointer = DIMENSION[name]
    return items


@pytest.mark.parametrize("turn", [[0, 1, 2], [0, 2, 1], [2, 1, 0]])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_same_orientation_and_input_as_of_classic_slices(turn, backwards):
    affine = AFFINE[:, [*turn, 3]]
    if np.linalg.det(affine[:3, :3]) < 0:
        affine = affine @ np.diag([1, 1, -1, 1])
    scan = slices(HU, affine)
    classic, frames = read([to_bytes(each) for each in scan]), read(to_bytes(enhanced(scan[:: -1 if backwards else 1])))
    assert (frames.sha256, frames.stored_axes, frames.warnings) == (classic.sha256, classic.stored_axes, ())
    np.testing.assert_allclose(frames.affine, classic.affine)
    as_stored = SPECS["reference"].model_copy(update={"grid": (16, 32, 32), "chunks": 2})
    np.testing.assert_array_equal(prepare(frames, as_stored).voxels, prepare(classic, as_stored).voxels)


def test_groups_at_the_top_level_in_each_frame_or_shared():
    scan = slices(HU)
    shared, own, above = enhanced(scan), enhanced(scan), enhanced(scan)
    for name in FRAME_TAGS:
        if name != "PlanePositionSequence":
            for group in own.PerFrameFunctionalGroupsSequence:
                setattr(group, name, getattr(own.SharedFunctionalGroupsSequence[0], name))
    del own.SharedFunctionalGroupsSequence
    for name, tags in FRAME_TAGS.items():
        for tag in tags if name != "PlanePositionSequence" else []:
            setattr(above, tag, getattr(scan[0], tag))
    del above.SharedFunctionalGroupsSequence
    assert read(to_bytes(shared)).sha256 == read(to_bytes(own)).sha256 == read(to_bytes(above)).sha256


def test_scaling_is_each_frames_own():
    scan = slices(HU)
    frames = enhanced(scan)
    pixels = np.frombuffer(frames.PixelData, "<i2").reshape(16, -1).copy()
    for index, group in enumerate(frames.PerFrameFunctionalGroupsSequence):
        item = Dataset()
        item.RescaleSlope, item.RescaleIntercept = 1, -1024 - index
        group.PixelValueTransformationSequence = [item]
        pixels[index] += index
    frames.PixelData = pixels.tobytes()
    np.testing.assert_array_equal(read(to_bytes(frames)).hu, HU)


@pytest.mark.parametrize("limit", [None, 3010])
def test_padding_is_air(limit):
    frames = enhanced(slices(HU))
    pixels = np.frombuffer(frames.PixelData, "<i2").reshape(16, 20, 24).copy()
    pixels[:, :3] = 3000
    pixels[:, 3] = 3000 if limit is None else limit
    frames.PixelData = pixels.tobytes()
    frames.add_new("PixelPaddingValue", "SS", 3000)
    if limit:
        frames.add_new("PixelPaddingRangeLimit", "SS", limit)
    volume = read(to_bytes(frames))
    assert (volume.hu[:, -4:] == -1024).all() and volume.hu.max() < 500
    assert volume.warnings == ("padding_clipped",)


def test_missing_rescale_is_said_and_a_table_applied():
    frames = enhanced(slices(HU))
    del frames.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    assert read(to_bytes(frames)).warnings == ("no_rescale", "not_hu")
    volume = read(to_bytes(frames), rescale=(1, -1024))
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.warnings == ("no_rescale", "rescaled_by_table")
    frames = enhanced(slices(HU))
    del frames.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0].RescaleSlope
    np.testing.assert_array_equal(read(to_bytes(frames)).hu, HU)


def concatenation(pieces: int = 3) -> list[Dataset]:
    scan = slices(HU)
    bounds = np.linspace(0, 16, pieces + 1).astype(int)
    made = []
    for n in range(pieces):
        made.append(enhanced(scan[bounds[n] : bounds[n + 1]], SOPInstanceUID=f"1.9.{n}", ConcatenationUID="1.9"))
        made[n].InConcatenationNumber, made[n].InConcatenationTotalNumber = n + 1, pieces
        made[n].ConcatenationFrameOffsetNumber = int(bounds[n])
    return made


def test_a_concatenation_is_joined_and_one_that_lacks_pieces_is_partial():
    files = [to_bytes(each) for each in concatenation()]
    volume = read(files[::-1])
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.warnings == ()
    assert read(files[:2]).warnings == ("partial",)


def test_one_frame_a_file():
    files = [to_bytes(enhanced([each], SOPInstanceUID=f"1.9.{n}")) for n, each in enumerate(slices(HU))]
    volume = read(files[::-1])
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.warnings == ()


@pytest.mark.parametrize("offset", [0, 0.015, 1.5])
@pytest.mark.parametrize("name", TELLING)
def test_phases_in_one_object_are_told_apart(name, offset):
    def value(phase: int, z: int) -> object:
        if name == "DimensionIndexValues":
            return [phase, z]
        return f"2020010112000{phase}" if "DateTime" in name else str(phase) if name == "StackID" else phase

    pairs = [
        (each, {name: value(phase, z)})
        for z, both in enumerate(zip(slices(HU), moved(chest(seed=1), offset), strict=True), 1)
        for phase, each in enumerate(both, 1)
    ]
    datasets, content = zip(*pairs, strict=True)
    frames = enhanced(list(datasets), list(content))
    frames.DimensionIndexSequence = dimensions("TemporalPositionIndex", "InStackPositionNumber")
    volume = read(to_bytes(frames))
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.warnings == ("partial",)


def test_frames_that_say_nothing_are_named():
    frames = enhanced(slices(HU))
    del frames.PerFrameFunctionalGroupsSequence[4].PlanePositionSequence
    with pytest.raises(Rejection, match="ImagePositionPatient of frame 5") as rejected:
        read(to_bytes(frames))
    assert rejected.value.reason == "enhanced_unreadable"
    frames = enhanced(slices(HU))
    del frames.PerFrameFunctionalGroupsSequence
    with pytest.raises(Rejection) as rejected:
        read(to_bytes(frames))
    assert rejected.value.reason == "enhanced_unreadable"
    frames = enhanced(slices(HU))
    del frames.PerFrameFunctionalGroupsSequence[3]
    with pytest.raises(Rejection, match="PerFrameFunctionalGroupsSequence"):
        read(to_bytes(frames))


def test_an_object_that_is_there_twice_is_one_scan():
    twice = [enhanced(slices(HU), SOPInstanceUID=f"1.9.{n}") for n in (1, 2)]
    volume = read([to_bytes(each) for each in twice])
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.warnings == ("duplicates_dropped",)


def test_compressed_frames():
    frames = enhanced(slices(HU))
    frames.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    np.testing.assert_array_equal(read(to_bytes(frames)).hu, HU)

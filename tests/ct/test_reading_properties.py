"""Whatever the file: the same HU come back, or a Rejection says why not."""

from __future__ import annotations

import contextlib
import io

import nibabel as nib
import numpy as np
import pydicom
import pytest
from ct_scans import AFFINE, chest, nifti, slices, to_bytes, zipped
from hostile import FEW, MANY, edits, is_read_or_rejected, mutated
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mu2llm.ct import read

shapes = st.tuples(*[st.integers(2, 7)] * 3)
orientations = st.tuples(st.permutations(range(3)), st.tuples(*[st.sampled_from([1, -1])] * 3))
spacings = st.tuples(*[st.floats(0.2, 9)] * 3)
integers = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64"]


def turned(affine: np.ndarray, orientation: tuple, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    ornt = np.array(list(zip(*orientation, strict=True)))
    return ornt, affine @ nib.orientations.inv_ornt_aff(ornt, shape)


@FEW
@given(
    data=st.data(),
    shape=shapes,
    spacing=spacings,
    orientation=orientations,
    dtype=st.sampled_from([*integers, "float32", "float64"]),
    scaling=st.one_of(
        st.just((1.0, 0.0)),
        st.just((1.0, -1024.0)),
        st.tuples(st.floats(0.0625, 10, width=32), st.floats(-8192, 1024, width=32)),
    ),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
    big_endian=st.booleans(),
    compress=st.booleans(),
)
def test_nifti_round_trips(data, shape, spacing, orientation, dtype, scaling, kind, big_endian, compress):
    info = np.iinfo(dtype) if dtype in integers else None
    low, high = (max(info.min, -9000), min(info.max, 9000)) if info else (-9000, 9000)
    values = st.integers(low, high) if info else st.floats(low, high, width=32)
    stored = data.draw(hnp.arrays(dtype, shape, elements=values))
    slope, intercept = (float(np.float32(value)) if kind is nib.Nifti1Image else value for value in scaling)
    expected = np.maximum(stored.astype(np.float64) * slope + intercept, -1024)
    ornt, affine = turned(np.diag([*spacing, 1]), orientation, shape)
    raw = nifti(nib.orientations.apply_orientation(stored, ornt), affine, scaling, kind, big_endian, compress)
    volume = read(raw)
    np.testing.assert_allclose(volume.hu, expected, rtol=1e-6, atol=1e-3)
    np.testing.assert_array_equal(np.rint(volume.hu), np.rint(expected))
    np.testing.assert_allclose(volume.spacing_mm, spacing, rtol=1e-5)
    assert set(volume.warnings) <= {"padding_clipped", "not_hu"}


@FEW
@given(
    data=st.data(),
    shape=shapes,
    spacing=spacings,
    orientation=orientations,
    scaling=st.sampled_from([(1, 0), (1, -1024), (2, -1000), (0.5, -8192)]),
    seed=st.integers(0, 99),
)
def test_dicom_round_trips(data, shape, spacing, orientation, scaling, seed):
    hu = data.draw(hnp.arrays(np.int16, shape, elements=st.integers(-1024, 3071))) // 2 * 2
    ornt, affine = turned(np.diag([*spacing, 1]), orientation, shape)
    if np.linalg.det(affine[:3, :3]) < 0:  # DICOM slices go up along the normal
        ornt[2, 1] *= -1
        affine = np.diag([*spacing, 1]) @ nib.orientations.inv_ornt_aff(ornt, shape)
    datasets = slices(nib.orientations.apply_orientation(hu, ornt), affine, scaling)
    np.random.default_rng(seed).shuffle(datasets)
    volume = read([to_bytes(each) for each in datasets])
    np.testing.assert_array_equal(volume.hu, hu)
    np.testing.assert_allclose(volume.spacing_mm, spacing, rtol=1e-4)
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], [0, 0, 0, 1], atol=0.01)


PLAIN = nifti(chest((6, 5, 4)), compress=False)
GZIPPED = nifti(chest((6, 5, 4)))
SLICES = [to_bytes(each) for each in slices(chest((6, 5, 4)))]
ZIPPED = zipped({f"IM{index}": data for index, data in enumerate(SLICES)})


def compressed_slices() -> list[bytes]:
    datasets = slices(chest((32, 32, 2)))
    for each in datasets:
        each.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    return [to_bytes(each) for each in datasets]


RLE = compressed_slices()


@MANY
@given(st.binary(max_size=2000))
def test_random_bytes(data):
    is_read_or_rejected(data)
    for magic in (b"\x1f\x8b\x08", b"PK\x03\x04", b"\x5c\x01\0\0", b"\x08\0\x05\0", bytes(128) + b"DICM"):
        is_read_or_rejected(magic + data)
    is_read_or_rejected([data, SLICES[0]])


@MANY
@given(changes=edits, head=st.booleans())
def test_mutated_nifti(changes, head):
    is_read_or_rejected(mutated(PLAIN, changes, head))
    is_read_or_rejected(mutated(GZIPPED, changes, head))


@settings(FEW, max_examples=120)  # each is three series
@given(changes=edits, head=st.booleans(), which=st.integers(0, 3))
def test_mutated_dicom(changes, head, which):
    is_read_or_rejected([mutated(data, changes, head) if n == which else data for n, data in enumerate(SLICES)])
    is_read_or_rejected([mutated(data, changes, head) for data in SLICES])
    is_read_or_rejected([mutated(data, changes, False) if n == which % 2 else data for n, data in enumerate(RLE)])


@FEW
@given(changes=edits, head=st.booleans())
def test_mutated_zip(changes, head):
    is_read_or_rejected(mutated(ZIPPED, changes, head))


@MANY
@given(field=st.sampled_from(list(nib.Nifti1Header().keys())), data=st.data())
def test_any_header_field_may_hold_anything(field, data):
    header = nib.Nifti1Header(PLAIN[:348], check=False)
    dtype, offset = header.structarr.dtype.fields[field][:2]
    noise = data.draw(st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize))
    is_read_or_rejected(PLAIN[:offset] + noise + PLAIN[offset + dtype.itemsize :])


@FEW
@given(
    tag=st.sampled_from(
        ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames",
         "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope",
         "RescaleIntercept", "ImageType", "AcquisitionNumber", "PhotometricInterpretation", "Modality"]
    ),
    value=st.one_of(
        st.binary(max_size=10), st.sampled_from([b"", b"1e999", b"nan", b"-0", b"1\\2\\3", b"\xff\xff"])
    ),
    everywhere=st.booleans(),
)  # fmt: skip
def test_any_dicom_tag_may_hold_anything(tag, value, everywhere):
    datasets = slices(chest((6, 5, 4)))
    files = []
    for index, each in enumerate(datasets):
        if everywhere or index == 1:
            vr = pydicom.datadict.dictionary_VR(tag)
            each[tag] = pydicom.dataelem.RawDataElement(
                pydicom.tag.Tag(pydicom.datadict.tag_for_keyword(tag)), vr, len(value), value, 0, False, True
            )
        stream = io.BytesIO()
        with contextlib.suppress(Exception):  # what pydicom refuses to write is no test
            each.save_as(stream, enforce_file_format=True)
        files.append(stream.getvalue())
    is_read_or_rejected(files)


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), 1e30), -AFFINE, AFFINE[[1, 1, 2, 3]]])
def test_any_affine(affine):
    header = nib.Nifti1Header(PLAIN[:348], check=False)
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        header[name] = affine[row]
    header["qform_code"] = 0
    is_read_or_rejected(header.binaryblock + PLAIN[348:])

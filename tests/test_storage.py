"""Storage: the same for local paths and S3 (the embedded server); what fails is tried again, and then said loudly."""

import contextlib
import os
import pickle
import secrets
import socket
import subprocess
import sys
import time

import pyarrow as pa
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


def test_deleting_a_file_leaves_the_others_of_its_folder(place):
    folder = storage.join(place, "others", "deep")
    for name in ("a", "b", "c"):
        storage.write_bytes(storage.join(folder, name), name.encode())
    storage.delete(storage.join(folder, "a"))
    assert [info.base_name for info in storage.list_files(folder)] == ["b", "c"]
    assert storage.read_bytes(storage.join(folder, "b")) == b"b"
    storage.delete(folder)
    storage.write_bytes(storage.join(folder, "a"), b"new")
    assert [info.base_name for info in storage.list_files(storage.join(place, "others"))] == ["a"]


def test_a_pickled_filesystem_deletes_as_the_original_does(place):
    folder = storage.join(place, "pickled")
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


def test_a_missing_file_raises_at_once_without_retries(place):
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


@pytest.fixture(params=["local", "s3"])
def other_place(request, tmp_path):
    return str(tmp_path / "other") if request.param == "local" else f"{request.getfixturevalue('bucket')}/other"


def test_files_and_folders_are_copied_between_any_two_storages(place, other_place):
    source, target = storage.join(place, "copied"), storage.join(other_place, secrets.token_hex(4))
    for name in ("a", "y/b", "y/deep/c.bin"):
        storage.write_bytes(storage.join(source, name), name.encode())
    storage.copy(source, storage.join(target, "folder"))
    storage.copy(storage.join(source, "y/deep/c.bin"), storage.join(target, "new", "file.bin"))
    assert {path: info.size for path, info in storage.files_below(target).items()} == {
        "folder/a": 1,
        "folder/y/b": 3,
        "folder/y/deep/c.bin": 12,
        "new/file.bin": 12,
    }
    assert storage.read_bytes(storage.join(target, "folder", "y", "b")) == b"y/b"
    assert storage.read_bytes(storage.join(target, "new", "file.bin")) == b"y/deep/c.bin"


def test_what_is_not_there_is_not_copied(place, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        storage.copy(storage.join(place, "nothing-here"), str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_a_copy_that_fails_leaves_no_file(place, tmp_path, monkeypatch):
    storage.write_bytes(storage.join(place, "long"), b"x" * 1000)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(storage.shutil, "copyfileobj", lambda source, target, size: target.write(source.read(10)))
    with pytest.raises(Failure, match="10 of 1000 bytes arrived"):
        storage.copy(storage.join(place, "long"), str(tmp_path / "copy" / "long"))
    assert list((tmp_path / "copy").iterdir()) == []


def test_a_local_copy_has_the_name_of_what_was_copied(place):
    for name in ("x/weights.bin", "x/y/b"):
        storage.write_bytes(storage.join(place, name), name.encode())
    with storage.local_copy(storage.join(place, "x")) as folder:
        assert folder.name == "x" and sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["b", "weights.bin"]
    with storage.local_copy(storage.join(place, "x", "weights.bin")) as file:
        assert file.name == "weights.bin" and file.read_bytes() == b"x/weights.bin"
    assert file.exists() == (not storage.is_remote(place))
    with storage.local_copy(storage.join(place, "nothing")) as nothing:
        assert not nothing.exists()


def test_tables_are_written_and_read(place):
    uri = storage.join(place, "tables", "t.parquet")
    storage.write_table(uri, pa.table({"a": [1, 2]}))
    assert storage.read_table(uri).to_pylist() == [{"a": 1}, {"a": 2}]


def test_a_client_is_kept_until_the_credentials_of_the_environment_change(bucket, monkeypatch):
    kept = storage.resolve(f"{bucket}/a")[0]
    assert storage.resolve(f"{bucket}/b")[0] is kept
    monkeypatch.setenv("AWS_SESSION_TOKEN", "rotated")
    assert storage.resolve(f"{bucket}/a")[0] is not kept


def test_a_process_that_was_forked_has_clients_of_its_own(bucket):
    code = (
        "import os; from mu2llm import storage\n"
        "storage.write_bytes('s3://bucket/before', b'1'); kept = storage.resolve('s3://bucket')[0]\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    assert storage.resolve('s3://bucket')[0] is not kept\n"
        "    storage.delete('s3://bucket/before'); storage.write_bytes('s3://bucket/after', b'2'); os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert storage.read_bytes('s3://bucket/after') == b'2' and not storage.exists('s3://bucket/before')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


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


def test_failing_storage_is_retried_and_then_a_failure(monkeypatch):
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
    with pytest.raises(Failure, match="s3://y: storage failed 5 times: ACCESS_DENIED; fix it"):
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

"""One copy a node, and none that stays."""

import os
import subprocess
import sys
import tempfile

import pytest

from mu2llm import storage
from mu2llm.shared_copies import shared


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def left(folder):
    return sorted(path.name for path in folder.glob("mu2llm-copies-*/*"))


def test_users_at_the_same_time_share_a_copy_and_the_last_removes_it(temporary):
    made = []

    def make(place):
        made.append(place)
        place.mkdir()
        (place / "weights").write_bytes(b"1")

    with shared("a", make) as first:
        with shared("a", make) as second, shared("b", make) as other:
            assert first == second != other and (second / "weights").exists()
        assert left(temporary) == ["a", "a.lock"]
        assert (first / "weights").read_bytes() == b"1"
    assert left(temporary) == [] and len(made) == 2


def test_a_copy_that_fails_leaves_nothing_and_is_made_again(temporary):
    def fails(place):
        place.mkdir()
        raise KeyError

    with pytest.raises(KeyError), shared("a", fails):
        pass
    with shared("a", lambda place: place.mkdir()) as place:
        assert place.exists()
    assert left(temporary) == []


def test_what_a_killed_process_left_is_used_or_removed(temporary):
    code = (
        "import os; from mu2llm.shared_copies import shared\n"
        "def make(place): place.mkdir()\n"
        "kept = [shared(name, make) for name in 'ab']; [each.__enter__() for each in kept]; os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=False, env=os.environ, timeout=60)
    assert left(temporary) == ["a", "a.lock", "b", "b.lock"]
    with shared("a", lambda place: pytest.fail("it is there")):
        pass
    assert left(temporary) == []


def test_processes_of_a_node_copy_a_checkpoint_once(temporary, monkeypatch):
    """Every actor made a copy of its own of a whole checkpoint."""
    (temporary / "s3" / "bucket").mkdir(parents=True)
    copied = []
    copy = storage.copy
    monkeypatch.setattr(storage, "copy", lambda *places: [copied.append(places), copy(*places)])
    with storage.embedded_s3(temporary / "s3"):
        storage.write_bytes("s3://bucket/checkpoint/model.bin", b"1")
        with storage.local_copy("s3://bucket/checkpoint") as one, storage.local_copy("s3://bucket/checkpoint") as two:
            assert one == two and one.name == "checkpoint" and (one / "model.bin").read_bytes() == b"1"
            storage.write_bytes("s3://bucket/checkpoint/model.bin", b"22")
            with storage.local_copy("s3://bucket/checkpoint") as anew:
                assert (anew / "model.bin").read_bytes() == b"22" != (one / "model.bin").read_bytes()
    assert len(copied) == 2 and left(temporary) == []

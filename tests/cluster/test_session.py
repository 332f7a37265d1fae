"""The Ray of a command's own."""

from importlib import import_module

session = import_module("mu2llm.cluster.session")  # the package has the function under this name


def test_the_object_store_grows_with_the_machine_and_stays_within_shared_memory(monkeypatch, tmp_path):
    """It had 1 GiB also on a machine with 2 TB."""
    gib, shared = 2**30, [0]
    monkeypatch.setattr(session, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(session.shutil, "disk_usage", lambda _: type("Usage", (), {"free": shared[0]}))
    for memory, free, wanted in ((8, 4, 1), (64, 32, 4), (2048, 1024, 128), (2048, 100, 90), (2048, 0.1, 1)):
        shared[0] = int(free * gib)
        monkeypatch.setattr(session, "machine_memory", lambda memory=memory: memory * gib)
        assert session.object_store() == wanted * gib
    monkeypatch.setattr(session, "SHARED_MEMORY", tmp_path / "none")
    assert session.object_store() == 128 * gib

"""The runner's own bookkeeping, without Ray."""

import json

from mu2llm import config, storage
from mu2llm.stages import runner


def job(folder):
    experiment = config.load("tiny").model_dump(mode="json")
    return runner.Job(
        **{"stage": "sft", "experiment": experiment, "data": "", "data_checksum": "", "out": str(folder / "out")},
        **{"spec_hash": "", "rows": 8},
    )


def test_a_list_of_checkpoints_that_was_half_written_is_put_back(tmp_path, caplog):
    stage = job(tmp_path)
    snapshot = storage.join(stage.state, runner.SNAPSHOT_FILE)
    runner._mend_snapshot(stage)  # nothing there yet
    whole = json.dumps({"checkpoint_results": ["a"]}).encode()
    storage.write_bytes(snapshot, whole)
    runner._keep_snapshot(stage)
    storage.write_bytes(snapshot, whole[:9])
    runner._keep_snapshot(stage)  # a half is not kept
    runner._mend_snapshot(stage)
    assert storage.read_bytes(snapshot) == whole
    assert not caplog.records
    storage.delete(storage.join(stage.state, runner.KEPT_SNAPSHOT_FILE))
    storage.write_bytes(snapshot, b"")
    runner._mend_snapshot(stage)
    assert not storage.exists(snapshot)
    assert "starts anew" in caplog.text

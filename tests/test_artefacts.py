"""Checkpoints in storage."""

from __future__ import annotations

import pytest

from mu2llm.artefacts import open_checkpoint, publish
from mu2llm.errors import UserError
from mu2llm.records import Checkpoint, Lineage


def test_a_checkpoint_is_whole_once_it_describes_itself(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "model.safetensors").write_bytes(b"weights")
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="not a checkpoint"):
        open_checkpoint(out)
    checkpoint = Checkpoint(uri=out, experiment={"seed": 1}, lineage=Lineage(stage="sft", spec_hash="abc"))
    publish(checkpoint, str(tmp_path / "local"))
    assert open_checkpoint(out).lineage.stage == "sft"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"weights"

"""What SFT keeps of its training scans, and what DPO carries on."""

import logging
from types import SimpleNamespace

import pytest
import torch
from small_runs import case, write_checkpoint, write_shards

from mu2llm import model as models
from mu2llm.engine.features import read_scans
from mu2llm.model.familiarity import FILE, Familiarity, pooled
from mu2llm.stages.training_scans import carry, remember

JOB = SimpleNamespace(out="out", settings=SimpleNamespace(gpus_per_worker=0, precision="fp32"))


@pytest.mark.parametrize(("count", "kept"), [(60, True), (49, False)])
def test_the_statistics_of_the_training_scans_lie_in_the_checkpoint(tmp_path, caplog, count, kept):
    shards = write_shards(str(tmp_path / "shards"), [case(i) for i in range(count)], "train")
    model, _ = models.load(write_checkpoint(str(tmp_path / "c"), 0), torch.float32)
    with caplog.at_level(logging.WARNING):
        remember(model.train(), JOB, shards, str(tmp_path))
    known = Familiarity.read(str(tmp_path))
    assert (known is not None) == kept and ("too few" in caplog.text) == (not kept)
    if known:
        own = pooled(*read_scans(model, shards, "train", torch.arange(8).numpy()))
        assert len(known.distances) == count and max(known.percentiles(own)) < 100


def test_what_a_parent_keeps_is_carried_and_what_it_does_not_keep_is_said(tmp_path, caplog):
    for name in ("old", "parent", "to"):
        (tmp_path / name).mkdir()
    (tmp_path / "parent" / FILE).write_bytes(b"x")
    carry(str(tmp_path / "old"), str(tmp_path / "to"))
    assert not list((tmp_path / "to").iterdir()) and "cannot tell scans unlike" in caplog.text
    carry(str(tmp_path / "parent"), str(tmp_path / "to"))
    assert (tmp_path / "to" / FILE).read_bytes() == b"x"

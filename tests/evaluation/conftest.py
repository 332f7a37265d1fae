import shutil

import pytest
from small_runs import case, write_checkpoint, write_shards


@pytest.fixture(autouse=True)
def tracking_store(empty_store, tmp_path, monkeypatch):
    """Every test's own, so that none writes into the working directory."""
    shutil.copy(empty_store, tmp_path / "tracking.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracking.db")


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(str(tmp_path_factory.mktemp("shards")), [case(i) for i in range(10)])


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {stage: write_checkpoint(str(folder / stage), seed, stage) for seed, stage in enumerate(("sft", "dpo"))}

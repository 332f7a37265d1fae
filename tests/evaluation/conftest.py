import shutil

import pytest
from small_runs import checkpoints, shards  # noqa: F401


@pytest.fixture(autouse=True)
def tracking_store(empty_store, tmp_path, monkeypatch):
    """Every test's own, so that none writes into the working directory."""
    shutil.copy(empty_store, tmp_path / "tracking.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracking.db")

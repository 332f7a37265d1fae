"""One Ray for all tests; the real material beside the project, where it is there."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real scans, reports and known answers."""
    if not SHARED.is_dir():
        pytest.skip(f"the folder {SHARED.name} with real material is not beside the project")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def spool(tmp_path_factory):
    """What waits for a tracking store waits here, and not in the user's own state folder."""
    os.environ["MU2LLM_SPOOL"] = str(tmp_path_factory.mktemp("spool"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A tracking store without runs, to copy: MLflow takes seconds to make one."""
    from mu2llm.tracking.client import client

    path = tmp_path_factory.mktemp("store") / "empty.db"
    client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def ray_cluster():
    """The one Ray that all tests share. It counts more CPUs than there are, so that small jobs never wait."""
    from mu2llm.cluster import session

    with session(cpus=8):
        yield

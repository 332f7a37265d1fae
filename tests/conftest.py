"""One Ray for all tests; the real material beside the project, where it is there."""

import os
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # "the Ray that runs here" is looked up in its folder
    os.environ["RAY_TMPDIR"] = f"/tmp/ray-{worker}"

SHARED = Path(__file__).resolve().parents[2] / "shared"


def meets_ray(file: Path) -> bool:
    """Whether a file's tests meet the one Ray, by themselves or by what their folder brings."""
    folder = file.with_name("conftest.py")
    brought = folder.is_file() and folder.parent != Path(__file__).parent and "ray_cluster" in folder.read_text()
    return brought or "ray_cluster" in file.read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the two processes that share the suite end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """Every file that meets the one Ray goes to one process, the others file by file to whichever is free."""

    class ByRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "ray" if meets_ray(config.rootpath / file) else file

    return ByRay(config, log)


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

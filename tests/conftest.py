"""One Ray for all tests of a process; the real material beside the project, where it is there."""

import contextlib
import os
import sys
from pathlib import Path

import pytest
from patience import PATIENCE
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name, value in PATIENCE.items():
    os.environ.setdefault(name, value)

SHARED = Path(__file__).resolve().parents[2] / "shared"
WHOLE = ("cluster", "serving")  # folders whose cluster or service is started once, for all their files


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that processes which share the suite end at the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes are named by their number: compressed ones hold the time, and all processes must name a test alike."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


class ByFile(LoadScopeScheduling):
    """Processes share the suite by files. (xdist's own groups need `item._nodeid`, which pytest 9.2 has no more.)"""

    def _split_scope(self, nodeid: str) -> str:
        path = Path(nodeid.split("::")[0])
        return path.parent.name if path.parent.name in WHOLE else str(path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


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

    with contextlib.ExitStack() as stack:
        for left in (2, 1, 0):
            try:
                stack.enter_context(session(cpus=8))
                break
            except Exception as error:  # Ray gives its node 30 seconds to start, fewer than a loaded machine takes
                if not left or "timed out during startup" not in str(error):
                    raise
        yield


@pytest.fixture(scope="module")
def actors_here():
    """The engine's actors are objects of this process; each one of Ray's is a process that loads torch first."""
    import in_process
    import ray.data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.data.Dataset, "map_batches", in_process.map_batches)
        yield


@pytest.fixture
def run(monkeypatch, capsys):
    """(exit code, stdout, stderr) of a command line, run in this process."""
    from mu2llm import cli

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["mu2llm", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return command

"""What the tests of whole stages begin with: a folder with a tracking store of its own, and shards of phantoms."""

import shutil

import pytest

from mu2llm.cases import ingest, read_manifest
from mu2llm.ct import phantom


@pytest.fixture(scope="module")
def place(tmp_path_factory, empty_store):
    folder = tmp_path_factory.mktemp("stages")
    shutil.copy(empty_store, folder / "mu2llm.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mu2llm.db")
        yield folder


@pytest.fixture(scope="module")
def shards(ray_cluster, place, request):
    """24 phantoms as the module's `experiment()` reads them."""
    experiment = request.module.experiment()
    manifest = phantom.write(str(place / "scans"), 24, seed=3)
    table = read_manifest(manifest, "jsonl", str(place / "scans"), experiment.data)
    ingest(table, str(place / "shards"), experiment)
    return str(place / "shards")

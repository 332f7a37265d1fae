"""A cluster of its own for the tests that send jobs: a head with token authentication, over HTTP, started once."""

import shutil

import pytest
from hosts import Hosts, ingest, mu2llm

from mu2llm.ct import phantom

SECRET = "s3cr3t-that-must-not-be-seen"


@pytest.fixture(scope="session")
def secret():
    """What lies in the environment of the nodes, as a Kubernetes secret would, and nowhere else."""
    return SECRET


@pytest.fixture(scope="session")
def head(tmp_path_factory, empty_store):
    """A running head of two CPUs, and whoever joins it."""
    store = tmp_path_factory.mktemp("head") / "tracking.db"
    shutil.copy(empty_store, store)
    environment = {"AWS_SECRET_ACCESS_KEY": SECRET, "MLFLOW_TRACKING_URI": f"sqlite:///{store}"}
    with Hosts(2, environment) as hosts:
        hosts.wait_for(1)
        yield hosts


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """A folder of 24 phantoms with their manifest, which all nodes share: they are one machine."""
    folder = tmp_path_factory.mktemp("scans")
    phantom.write(str(folder), 24, 0)
    return folder


@pytest.fixture(scope="session")
def ingested(head, scans, tmp_path_factory):
    """(shards, the finished `mu2llm submit ingest` that wrote them)."""
    shards = tmp_path_factory.mktemp("ingested") / "shards"
    done = mu2llm(head, "submit", *ingest(scans, shards), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    return shards, done

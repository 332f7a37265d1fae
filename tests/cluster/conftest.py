"""A cluster of its own for the tests that send jobs: a head with token authentication, over HTTP."""

import pytest
from hosts import Hosts

SECRET = "s3cr3t-that-must-not-be-seen"


@pytest.fixture(scope="session")
def secret():
    """What lies in the environment of the nodes, as a Kubernetes secret would, and nowhere else."""
    return SECRET


@pytest.fixture(scope="session")
def head(tmp_path_factory):
    """A running head of two CPUs."""
    store = f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mu2llm.db"
    with Hosts(2, {"AWS_SECRET_ACCESS_KEY": SECRET, "MLFLOW_TRACKING_URI": store}) as hosts:
        hosts.wait_for(1)
        yield hosts

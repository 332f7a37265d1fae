"""On a cluster that scales itself: an ingest that starts without a node brings nodes up, and they go again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "bench_autoscaling.py"


def test_an_ingest_brings_nodes_up_and_lets_them_go():
    # a Ray that this process had before has left its mode of authentication here, which is not this cluster's
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, BENCHMARK, "ingest"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = done.stdout
    assert re.search(r"scans (\d+) of \1,", told) and re.search(r"most nodes [123],", told), told
    # Ray's own autoscalers tell that they are there, and not what they can add: which placement and sweeps go by
    assert "scales itself True, tells its limits False" in told

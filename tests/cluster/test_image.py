"""The built image, run as the manifests run it. Only where MU2LLM_IMAGE names one: `make image image-check`."""

import json
import os
import shutil
import subprocess

import httpx
import pods
import pytest
from hosts import GUARD_S, free_port, mu2llm
from small_service import url_of, wait_until_ready

import mu2llm as package
from mu2llm.ct import phantom

IMAGE = os.environ.get("MU2LLM_IMAGE")
MISSING = [tool for tool in ("buildah", "crun", "unshare") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IMAGE, reason="MU2LLM_IMAGE names no image: make image image-check"),
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"needs root, buildah, crun, unshare: no {MISSING}"),
]


def buildah(*words):
    return subprocess.run(["buildah", *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def image():
    """Where the image's files are mounted."""
    made = buildah("from", "--pull-never", IMAGE)
    yield buildah("mount", made)
    buildah("rm", made)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder that user 1000 may write to, with 24 phantoms in it."""
    folder = tmp_path_factory.mktemp("shared")
    phantom.write(str(folder / "scans"), 24, 0)
    os.chown(folder, 1000, 1000)
    return folder


@pytest.fixture(scope="module")
def cluster(image, shared):
    """A head and a worker, each in its own container."""
    with pods.Pods(image, shared, {"MLFLOW_TRACKING_URI": "sqlite:////mnt/mu2llm.db"}) as made:
        made.worker(2)
        made.wait_for(2)
        yield made


def test_it_runs_as_nobody_much(image, tmp_path):
    script = "mu2llm --version && id -u && grep CapEff /proc/self/status && ! touch /home/ray/x && touch /tmp/x"
    done = pods.run(image, tmp_path / "who", "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [package.__version__, "1000", "CapEff:", "0" * 16] and "Read-only" in done.stderr


def test_rays_launcher_finds_ray(image, tmp_path):
    """It runs commands by such a shell, which forgets PATH."""
    done = pods.run(image, tmp_path / "login", "env", "PATH=/bin", "bash", "--login", "-c", "-i", "type ray mu2llm")
    assert done.returncode == 0 and "/opt/mu2llm/bin/ray" in done.stdout, done.stderr


def test_doctor_finds_nothing_amiss(image, tmp_path):
    done = pods.run(image, tmp_path / "doctor", "mu2llm", "doctor", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["ok"], done.stdout + done.stderr


def test_the_pipeline_that_is_sent_to_it_and_the_service_of_what_it_wrote(cluster, shared):
    asked = ["--preset", "tiny", "--manifest", "/mnt/scans/manifest.jsonl", "--volumes", "/mnt/scans"]
    done = mu2llm(cluster, "submit", "pipeline", "--driver-cpus", 1, *asked, "--out", "/mnt/run", "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((shared / "run" / "summary.json").read_text())
    assert summary["ingest"]["written"] == 24 and summary["registered"]["version"]
    port = free_port()
    command = ["mu2llm", "serve", "--checkpoint", summary["checkpoints"]["best"], "--address", "auto"]
    command += ["--port", port, "--set", "serving.state=/mnt/serve", "--set", "serving.authentication=off"]
    running = subprocess.Popen(cluster.on_head(*command), stderr=subprocess.PIPE, text=True)
    try:
        wait_until_ready(url_of(port), running)
        scan = next((shared / "scans" / "volumes").iterdir())
        with scan.open("rb") as stream:
            answer = httpx.post(f"{url_of(port)}/v1/reports", files={"scan": stream}, timeout=GUARD_S)
        assert answer.status_code == 200 and answer.json()["scan"]["format"] == "NIfTI", answer.text
    finally:
        running.terminate()
        running.communicate()

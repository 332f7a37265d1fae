"""One service for all serving tests, over real HTTP, on the Ray that all tests share."""

import os
import shutil
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import httpx
import pytest
import ray
from small_service import GUARD_S, PATIENT, PATIENT_ID, STUDY, free_port, url_of, wait_until_ready
from small_writer import FIRST, write_checkpoint

from mu2llm import config
from mu2llm.serving.traces import ENDPOINT


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(str(tmp_path_factory.mktemp("serving") / "first"), FIRST)


@pytest.fixture(scope="session")
def places(tmp_path_factory, empty_store):
    """Folders of the service: its state, kept scans, one that clients may name by URI; its tracking store."""
    root = tmp_path_factory.mktemp("service")
    for name in ("state", "kept", "allowed"):
        (root / name).mkdir()
    shutil.copy(empty_store, root / "tracking.db")
    return root


@pytest.fixture(scope="session")
def overrides(places):
    """What `--set` says of the service."""
    return [
        f"serving.state={places}/state",
        f"serving.keep_scans={places}/kept",
        f"serving.allowed_uris=['file://{places}/allowed']",
        "serving.max_body_mb=64",
        "serving.max_queued_requests=16",
        "serving.reading_seconds=60",
        "serving.registry_seconds=1",
        "serving.authentication=off",
        "serving.traces=1",
        "serving.drain_seconds=10",
    ]


@pytest.fixture(scope="session")
def settings(checkpoint, places, overrides):
    from mu2llm.serving.app import Settings

    given = config.load("demo", overrides)
    tracking = f"sqlite:///{places}/tracking.db"
    return Settings(checkpoint=checkpoint, tracking=tracking, loopback=True, serving=given.serving, judge=given.judge)


class Collector(BaseHTTPRequestHandler):
    """An OpenTelemetry collector, as far as it takes spans."""

    spans: ClassVar[list[Any]] = []

    def do_POST(self):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        self.spans.extend(s for r in sent.resource_spans for scope in r.scope_spans for s in scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


COLLECTOR = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
os.environ[ENDPOINT] = f"http://127.0.0.1:{COLLECTOR.server_port}"  # before Ray starts: its processes need it


@pytest.fixture(scope="session")
def spans():
    """Those that the service leaves, as they come."""
    Thread(target=COLLECTOR.serve_forever, daemon=True).start()
    yield Collector.spans
    COLLECTOR.shutdown()


@pytest.fixture(scope="session")
def service(ray_cluster, settings, overrides, spans):
    """The address of the running, ready service: one `mu2llm serve` for all tests, ended as an operator ends it."""
    port, address = free_port(), ray.get_runtime_context().gcs_address
    command = [Path(sys.executable).parent / "mu2llm", "serve", "--checkpoint", settings.checkpoint]
    command += ["--port", str(port), "--address", address, *(word for each in overrides for word in ("--set", each))]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": settings.tracking}
    running, url = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True), url_of(port)
    try:
        wait_until_ready(url, running)
        yield url
    finally:
        running.send_signal(signal.SIGTERM)
        told = running.communicate()[1]
    assert running.returncode == 0, told
    assert f"{url}/docs" in told.replace("\n", "")
    with pytest.raises(ValueError, match="SERVE_CONTROLLER_ACTOR"):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    assert ray.is_initialized()  # the Ray that was there before is left alone


@pytest.fixture
def client(service):
    with httpx.Client(base_url=service, timeout=GUARD_S) as made:
        yield made


@pytest.fixture(scope="session")
def phantom():
    """A small scan that the model takes: .nii.gz bytes."""
    from mu2llm.ct import phantom

    return phantom.make(3, 1).nifti()


@pytest.fixture(scope="session")
def dicom():
    """The files of a small DICOM series with a patient's name in them."""
    from ct_scans import chest, slices, to_bytes

    series = slices(chest())
    for dataset in series:
        dataset.PatientName, dataset.PatientID = PATIENT, PATIENT_ID
        dataset.StudyInstanceUID = STUDY
    return [to_bytes(dataset) for dataset in series]

"""Traces of the running service at a collector, and nothing of a client in them nor in the lines of Serve's log."""

import time
from pathlib import Path

import pytest
import ray
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace.status import StatusCode
from small_service import GUARD_S

from mu2llm import config
from mu2llm.errors import UserError
from mu2llm.serving import running, traces

MARK = "Zweistein"
UUID = "0b6b5f0e-9f5d-4e56-8d52-3d1f0a2b4c5d"


def test_a_span_passes_on_nothing_that_a_client_or_an_exception_wrote():
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(traces.WithoutContent(kept)))
    tracer = provider.get_tracer("serve")
    for request, method in ((UUID, "POST"), (MARK, MARK)):
        span = tracer.start_span(f"proxy_http_request Ingress {method} /v1/{MARK}")
        span.set_attributes({"http.route": f"/{MARK}", "http.method": method, "request_id": request, "app": "a"})
        span.record_exception(ValueError(f"{MARK} has a nodule"))
        span.set_status(StatusCode.ERROR, f"{MARK} has a nodule")
        span.end()
    ours, theirs = kept.get_finished_spans()
    assert ours.attributes == {"app": "a", "http.method": "POST", "request_id": UUID}
    assert theirs.attributes == {"app": "a"}
    assert not ours.status.is_ok and ours.name == "proxy_http_request Ingress"
    assert MARK not in ours.to_json() + theirs.to_json()


def test_traces_without_a_collector_are_refused(monkeypatch, settings):
    monkeypatch.delenv(traces.ENDPOINT)
    serving = config.load("demo", ["serving.traces=0.5", "serving.authentication=off"]).serving
    with pytest.raises(UserError, match=traces.ENDPOINT):
        running.check(settings.model_copy(update={"serving": serving}), "127.0.0.1", 8000)


def test_a_request_leaves_spans_of_its_way_and_no_word_of_its_own(client, phantom, spans):
    sent = {"files": {"scan": (f"{MARK}.nii.gz", phantom)}, "headers": {"x-request-id": MARK}}
    assert client.post(f"/v1/reports?{MARK}", **sent).status_code == 200
    assert client.get(f"/v1/jobs/{MARK}").status_code == 404
    deadline, missing = time.monotonic() + GUARD_S, {"Ingress", "VolumeReader", "ReportGenerator"}
    while missing and time.monotonic() < deadline:  # they are sent in batches
        missing -= {word for span in list(spans) for word in span.name.split()}
        time.sleep(0.2)
    assert not missing
    assert MARK not in str(spans)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path(), "serve")
    lines = {path: path.read_text() for path in logs.glob("*.log")}
    assert any(path.name.startswith("proxy") for path in lines)
    assert not [path.name for path, text in lines.items() if MARK in text]

"""Traces of the service: Ray Serve's own spans, of a request's way through the proxy and the replicas (issue 21).

They go to the OpenTelemetry collector that the nodes' environment names by OTEL_EXPORTER_OTLP_ENDPOINT, by HTTP. Serve
writes into them what a client sent (the path, a request's id) and what exceptions say: that is taken out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.status import Status
from ray.serve.schema import TracingConfig

from mu2llm import logs
from mu2llm.errors import UserError

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
KEPT = {"http.status_code", "deployment", "app", "replica_id", "call_method", "is_streaming"}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def tracing(fraction: float) -> TracingConfig:
    """That this fraction of the requests leaves spans; 0: none."""
    if not fraction:
        return TracingConfig(enabled=False)
    return TracingConfig(enabled=True, exporter_import_path=f"{__name__}:processors", sampling_ratio=fraction)


def processors() -> list[SpanProcessor]:
    """What Ray Serve calls in each of its processes."""
    return [BatchSpanProcessor(WithoutContent(sender()))]


def sender() -> SpanExporter:
    """Sends spans to the collector. Raises UserError where none is named, or what it takes is not installed."""
    if not os.environ.get(ENDPOINT):
        raise UserError(
            f"serving.traces needs {ENDPOINT} in the environment of this process and of the nodes, such as "
            "http://collector:4318; or set it to 0"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise UserError("serving.traces needs a package: pip install 'mu2llm[traces]', or set it to 0") from None
    return OTLPSpanExporter()


class WithoutContent(SpanExporter):
    """Passes spans on without what a client may have written in them."""

    def __init__(self, inner: SpanExporter) -> None:
        self.inner = inner

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self.inner.export([_without_content(span) for span in spans])

    def shutdown(self) -> None:
        self.inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self.inner.force_flush(timeout_millis)


def _without_content(span: ReadableSpan) -> ReadableSpan:
    there = span.attributes or {}
    attributes = {name: value for name, value in there.items() if name in KEPT}
    if there.get("http.method") in METHODS:
        attributes["http.method"] = there["http.method"]
    if logs.is_generated_id(str(there.get("request_id"))):
        attributes["request_id"] = there["request_id"]
    return ReadableSpan(
        name=" ".join(span.name.split()[:2]),  # what it is and of which deployment; method and path follow
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=attributes,
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )

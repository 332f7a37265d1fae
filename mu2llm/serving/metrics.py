"""What `/metrics` tells Prometheus. No label holds anything that a client sent."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MEDIA = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TENTHS = tuple(n / 10 for n in range(11))


class Metrics:
    """The numbers of one ingress replica: all requests pass through it, so it sees every step."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        at: dict[str, Any] = {"registry": self.registry, "namespace": "mu2llm"}
        self.requests = Counter("requests", "answers by path and status", ["path", "status"], **at)
        self.rejections = Counter("rejections", "scans refused, by reason code", ["reason"], **at)
        self.busy = Gauge("reports_in_progress", "report requests taken on and not answered yet", **at)
        self.waiting = Gauge("generator_queue", "requests that wait for room in a generator", **at)
        self.seconds = Histogram("step_seconds", "seconds by step of a report", ["step"], buckets=_SECONDS, **at)
        self.batch = Histogram("batch_size", "reports that were written together", buckets=(1, 2, 4, 8, 16, 32), **at)
        self.tokens = Counter("tokens", "tokens written", **at)
        self.rate = Histogram("tokens_per_second", "of one report", buckets=(1, 3, 10, 30, 100, 300, 1000), **at)
        self.cached = Counter("scans_cached", "reports whose scan was encoded before", **at)
        self.green = Histogram("green_score", "valid GREEN scores given", buckets=_TENTHS, **at)
        self.invalid = Counter("green_invalid", "invalid judgements", **at)
        self.retries = Counter("retries", "calls done again because a replica died", ["deployment"], **at)
        self.unsaved = Counter("reports_unsaved", "reports given whose record could not be stored", **at)
        self.corrections = Counter("corrections", "corrections stored", **at)
        self.ready = Gauge("ready", "1 when reports can be written", **at)

    def answered(self, path: str, status: int) -> None:
        self.requests.labels(path, status).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)

"""What the service tells Prometheus, through Ray's metrics. No label holds anything that a client sent.

Ray exports it on every node's metrics port, under these names with the prefix `ray_`, counters with the suffix
`_total`, and adds the labels `deployment`, `replica` and `application`. It sends a histogram as its counts by bucket:
quantiles are as fine as the buckets, and its sum is made of their middles.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import httpx
import ray
from ray.serve.metrics import Counter, Gauge, Histogram

logger = logging.getLogger("ray.serve")
MEDIA = "text/plain; version=0.0.4; charset=utf-8"
OURS = "ray_mu2llm_"
SILENT_S = 2.0  # after which a node's exporter is left out
_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
_SCORES = [0.01, *(n / 10 for n in range(1, 11))]  # 0, which a failed report gets, has a bucket of its own
_LENGTHS = [0.25, 0.5, 0.8, 0.95, 1.05, 1.25, 2, 4]
_REPORTS = [0.5, 1.5, 2.5, 4.5, 8.5, 16.5, 32.5]


class Metrics:
    """The numbers of one ingress replica, which sees every step of its requests."""

    def __init__(self) -> None:
        path_status: Any = ("path", "status")  # Ray's own signature says that there is one
        self.requests = Counter("mu2llm_requests", "answers by path and status", path_status)
        self.rejections = Counter("mu2llm_rejections", "scans refused, by reason code", ("reason",))
        self.busy = Gauge("mu2llm_reports_in_progress", "report requests taken on and not answered yet")
        self.waiting = Gauge("mu2llm_generator_queue", "requests that wait for room in a generator")
        self.seconds = Histogram("mu2llm_step_seconds", "seconds by step of a report", _SECONDS, ("step",))
        self.batch = Histogram("mu2llm_batch_size", "reports that were written together", _REPORTS)
        self.tokens = Counter("mu2llm_tokens", "tokens written")
        self.rate = Histogram("mu2llm_tokens_per_second", "of one report", [1, 3, 10, 30, 100, 300, 1000])
        self.cached = Counter("mu2llm_scans_cached", "reports whose scan was encoded before")
        self.green = Histogram("mu2llm_green_score", "valid GREEN scores given", _SCORES)
        self.invalid = Counter("mu2llm_green_invalid", "invalid judgements")
        self.retries = Counter("mu2llm_retries", "calls done again because a replica died", ("called",))
        self.unsaved = Counter("mu2llm_reports_unsaved", "reports given whose record could not be stored")
        self.corrections = Counter("mu2llm_corrections", "corrections stored")
        role_reason: Any = ("role", "reason")
        self.reports = Counter("mu2llm_reports", "reports given, by their checkpoint's role: served, canary", ("role",))
        self.rollout_failures = Counter("mu2llm_rollout_failures", "texts that a canary or shadow owes", role_reason)
        self.shadow_green = Histogram("mu2llm_shadow_green", "GREEN of a shadow's text against the shown one", _SCORES)
        self.shadow_findings = Counter("mu2llm_shadow_findings", "findings that one of both alone tells", ("by",))
        self.shadow_length = Histogram("mu2llm_shadow_length", "tokens of a shadow's text by the shown one's", _LENGTHS)
        self.ready = Gauge("mu2llm_ready", "1 when reports can be written")

    def answered(self, path: str, status: int) -> None:
        self.requests.inc(1, {"path": path, "status": str(status)})


def counted(counter: Counter, number: int) -> None:
    """Ray's counters take no zero."""
    if number:
        counter.inc(number)


def exported() -> str:
    """What all replicas counted, as their nodes' exporters tell it: some ten seconds old at most."""
    texts = []
    with httpx.Client(timeout=SILENT_S, trust_env=False, verify=False) as client:  # plain HTTP, within the cluster
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            try:
                place = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
                texts.append(client.get(place).raise_for_status().text)
            except httpx.HTTPError as error:
                logger.warning("the metrics of node %s are left out: %s", node["NodeID"], type(error).__name__)
    return merged(texts)


def merged(texts: Iterable[str]) -> str:
    """Several nodes' expositions as one of our own numbers, in which each name is described once."""
    families: dict[str, dict[str, None]] = {}
    for text in texts:
        lines: dict[str, None] = {}
        for line in text.splitlines():
            if line.startswith("# HELP "):
                lines = families.setdefault(line.split()[2], {})
            lines[line] = None
    return "".join(f"{line}\n" for name, lines in families.items() if name.startswith(OURS) for line in lines)

"""What operators see: dashboards and alerts name only what is exported, and Ray exports what we record."""

import json
import re
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import httpx
import pytest
import ray
import ray.dashboard.modules.metrics.dashboards as ray_dashboards
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.util.metrics import Counter, Gauge, Histogram

from mu2llm import telemetry
from mu2llm.serving.metrics import Metrics, merged

MONITORING = Path(__file__).resolve().parents[1] / "cluster" / "monitoring"
DASHBOARDS = ("pipeline", "service")


def exported():
    """Every name under which Prometheus gets a number of ours."""
    gauges = {f"ray_{name}" for name, _ in telemetry.TRAINING.values()}
    counters = {f"ray_{name}_total" for name, _ in (telemetry.INGESTED, telemetry.REJECTED)}
    return gauges | counters | served()


def served():
    """The service's part of them."""
    suffixes = {Counter: ["_total"], Histogram: ["_bucket", "_sum", "_count"], Gauge: [""]}
    return {
        f"ray_{metric.info['name']}{suffix}"
        for metric in vars(Metrics()).values()
        for kind, endings in suffixes.items()
        if isinstance(metric, kind)
        for suffix in endings
    }


def expressions():
    for name in DASHBOARDS:
        for panel in json.loads((MONITORING / f"{name}.json").read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"]
    for group in rules()["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def rules():
    return yaml.safe_load((MONITORING / "alerts.yaml").read_text())


def test_only_what_is_exported_is_named():
    folder = Path(ray_dashboards.__file__).parent
    rays = " ".join(path.read_text() for path in folder.glob("*_panels.py"))
    ours, seen = exported(), set()
    for where, expression in expressions():
        for name in re.findall(r"\b(?:ray|mu2llm)_\w+", expression):
            known = name in ours or ("mu2llm" not in name and re.search(rf"\b{name}\b", rays))
            assert known, f"{where}: nothing exports {name}"
            seen.add(name)
    assert ours - served() <= seen  # and everything of the pipeline is shown


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_one_that_grafana_takes(name):
    board = json.loads((MONITORING / f"{name}.json").read_text())
    assert board["uid"] == f"mu2llm-{name}" and board["schemaVersion"] >= 39
    assert board["templating"]["list"][0]["type"] == "datasource"
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in board["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in board["panels"]})
    for panel in board["panels"]:
        assert panel["title"] and panel["targets"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_alerts_are_rules_and_say_what_to_do():
    assert set(rules()) == {"groups"}
    names = []
    for group in rules()["groups"]:
        assert set(group) == {"name", "rules"}
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
            assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert rule["annotations"]["summary"] and rule["annotations"]["action"]
            assert all(rule["expr"].count(a) == rule["expr"].count(b) for a, b in ("()", "[]", "{}"))
            names.append(rule["alert"])
    assert len(set(names)) == len(names)


def test_prometheus_itself_takes_the_rules():
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian's package prometheus) is not here to check the rules")
    done = subprocess.run(["promtool", "check", "rules", MONITORING / "alerts.yaml"], capture_output=True, text=True)
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def test_two_nodes_numbers_are_one_exposition():
    """Prometheus takes no name that is described twice."""
    others = "# HELP ray_node_cpu cores\n# TYPE ray_node_cpu gauge\nray_node_cpu 3.0\n"
    ours = '# HELP ray_mu2llm_ready 1\n# TYPE ray_mu2llm_ready gauge\nray_mu2llm_ready{{replica="{}"}} 1.0\n'
    told = merged([others + ours.format("a"), ours.format("b") + others])
    [family] = text_string_to_metric_families(told)
    assert family.name == "ray_mu2llm_ready" and told.count("# ") == 2
    assert [sample.labels["replica"] for sample in family.samples] == ["a", "b"]


def test_a_shard_is_counted_by_result_and_reason(monkeypatch):
    counted = {}

    def inc(self, value, tags):
        key = (self.info["name"], *tags.values())
        counted[key] = counted.get(key, 0) + value

    monkeypatch.setattr(Counter, "inc", inc)
    telemetry.ingested(3, [{"reason": "not_hu"}, {"reason": "not_hu"}, {"reason": "one_slice"}])
    assert counted == {
        ("mu2llm_ingest_cases", "written"): 3,
        ("mu2llm_ingest_cases", "rejected"): 3,
        ("mu2llm_ingest_rejections", "not_hu"): 2,
        ("mu2llm_ingest_rejections", "one_slice"): 1,
    }


@pytest.mark.slow
def test_ray_exports_them_under_the_names_that_the_dashboards_use(ray_cluster):
    run, reason = f"run-{uuid.uuid4().hex}", f"reason-{uuid.uuid4().hex}"  # other tests' processes export theirs too
    telemetry.trained("sft", run, dict.fromkeys(telemetry.TRAINING, 0.5))
    telemetry.ingested(2, [{"reason": reason}])
    [node] = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {rf"\n{name}\{{" for name in exported() - served()}
    wanted |= {rf'ray_mu2llm_train_step\{{[^}}]*run="{run}"[^}}]*stage="sft"[^}}]*\}} 0\.5\n'}
    wanted |= {rf'ray_mu2llm_ingest_rejections_total\{{[^}}]*reason="{reason}"[^}}]*\}} 1(\.0)?\n'}
    deadline = time.monotonic() + 500
    while missing := {pattern for pattern in wanted if not re.search(pattern, httpx.get(url).text)}:
        assert time.monotonic() < deadline, f"not exported: {missing}"
        time.sleep(1)

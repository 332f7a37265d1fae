"""Reports over HTTP: forms, JSON, formats, streams, chat."""

import base64
import json

import httpx
import pytest

pytestmark = pytest.mark.slow


def post(client, scan, headers=None, **fields):
    return client.post("/v1/reports", files={"scan": ("scan.nii.gz", scan)}, data=fields, headers=headers or {})


def events(response):
    """[(event, data)] of a server-sent stream."""
    found = []
    for block in response.read().decode().strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((lines.get("event", ""), json.loads(lines["data"]) if lines["data"] != "[DONE]" else None))
    return found


def test_an_uploaded_scan_gets_a_report(client, phantom):
    answer = post(client, phantom)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert set(told) >= {"id", "report", "findings", "model", "spec", "scan", "seconds"}
    assert told["report"] and told["spec"]["name"] == "least"
    assert len(told["scan"]["sha256"]) == 64 and told["scan"]["format"] == "NIfTI"
    assert told["seconds"]["total"] > 0
    assert post(client, phantom).json()["report"] == told["report"]

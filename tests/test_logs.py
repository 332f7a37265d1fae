"""What a log line says it is of; nothing in it that a client wrote."""

import contextvars
import json
import logging
import sys

import pytest
from ray._common.formatters import JSONFormatter
from ray.serve._private.logging_utils import ServeContextFilter, ServeFormatter
from ray.serve.context import _set_request_context

from mu2llm import logs
from mu2llm.cluster.job import Lines

MARK = "Zweistein"
UUID = "0b6b5f0e-9f5d-4e56-8d52-3d1f0a2b4c5d"


@pytest.fixture
def say(monkeypatch):
    """Says a line as a process does where no handler takes it: pytest's would."""
    last = logging.lastResort
    assert last is not None
    before = last.formatter
    monkeypatch.setattr(logs, "_names", {})
    logs.begin()
    yield lambda level, text, *arguments, exc_info=None: last.handle(
        logging.LogRecord("mu2llm.bare", level, __file__, 1, text, arguments, exc_info)
    )
    last.setFormatter(before)


def test_a_line_names_its_stage_and_its_run(say, capsys, monkeypatch):
    monkeypatch.delenv(logs.MODE, raising=False)
    with logs.about(job="pipeline"), logs.about(stage="sft", run="4f2c"):
        say(logging.WARNING, "12 of %d", 60)
    say(logging.WARNING, "after")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("WARNING mu2llm.bare [job=pipeline stage=sft run=4f2c] 12 of 60")
    assert second.endswith("WARNING mu2llm.bare after")


def test_a_process_of_ray_data_names_what_it_is_for(say, capsys, monkeypatch):
    monkeypatch.delenv(logs.MODE, raising=False)
    logs.begin(stage="ingest")
    logs.begin(stage="generate", checkpoints="runs/sft")  # a worker takes one task after another
    say(logging.WARNING, "slow")
    assert "[stage=generate checkpoints=runs/sft] slow" in capsys.readouterr().err


def test_a_line_is_json_where_it_is_asked_for(say, capsys, monkeypatch):
    monkeypatch.setenv(logs.MODE, "json")
    with logs.about(stage="sft", run="4f2c"):
        try:
            raise ValueError("two\nlines")
        except ValueError:
            say(logging.ERROR, "it failed", exc_info=sys.exc_info())
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert (told["level"], told["logger"], told["stage"], told["run"]) == ("ERROR", "mu2llm.bare", "sft", "4f2c")
    assert told["message"].startswith("it failed\nTraceback") and told["message"].endswith("two\nlines")


def test_a_jobs_progress_is_json_too(capsys, monkeypatch):
    monkeypatch.setattr(logs, "_names", {})
    monkeypatch.setenv(logs.MODE, "json")
    with logs.about(job="pipeline"):
        Lines()("sft", 12, 60, {"loss": 1.5})
    told = json.loads(capsys.readouterr().out)
    assert told == {"job": "pipeline", "stage": "sft", "done": 12, "total": 60, "loss": 1.5}


@pytest.mark.parametrize("formatter", [JSONFormatter(), ServeFormatter("Ingress", "x")])
@pytest.mark.parametrize(("given", "kept"), [(UUID, True), (MARK, False), (f"{UUID}-{MARK}", False)])
def test_a_replicas_line_has_the_request_id_that_was_made_up_and_no_path(formatter, given, kept, capsys):
    """Serve takes a request's id from the client where it sends one, and puts the path beside it in JSON."""
    logger, handler = logging.getLogger("ray.serve"), logging.StreamHandler()
    before = logger.handlers[:]
    handler.setFormatter(formatter)
    handler.addFilter(ServeContextFilter())
    logger.handlers = [handler]

    def replica():
        _set_request_context(route=f"/v1/jobs/{MARK}", request_id=given)
        logs.withhold()
        logger.warning("a stream failed")

    try:
        contextvars.copy_context().run(replica)
    finally:
        logger.handlers = before
    told = capsys.readouterr().err
    assert "a stream failed" in told and MARK not in told and (UUID in told) == kept

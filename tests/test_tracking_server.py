"""A real MLflow server that is not there yet, is killed, hangs and comes back: no work stops, nothing is lost."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from mu2llm import tracking
from mu2llm.cli import app
from mu2llm.errors import Failure
from mu2llm.records import Checkpoint, Lineage
from mu2llm.tracking import sender
from mu2llm.tracking.client import answers

pytestmark = pytest.mark.slow


class Server:
    """`mlflow server` on a free port over one SQLite file."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = ["-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, *options],
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            )
        while not answers(self.uri):
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def kill(self):
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(empty_store, tmp_path, monkeypatch):
    shutil.copy(empty_store, tmp_path / "server.db")
    monkeypatch.setattr(sender, "LONGEST_PAUSE_S", 1.0)
    server = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def senders(monkeypatch):
    """The threads that have turned to the store."""
    found, deliver = set(), sender.deliver
    monkeypatch.setattr(sender, "deliver", lambda uri: found.add(threading.current_thread()) or deliver(uri))
    return found


def log(run, steps):
    for step in steps:
        run.log({"loss": 1 / (step + 1)}, step)


def test_work_goes_on_while_the_server_is_down_and_everything_arrives_once_and_in_order(server, senders, caplog, capfd):
    sweep = tracking.start_stage("sweep", {"trials": 1}, {"data": "s3://b/s", "data_checksum": "abc"})
    with tracking.under(sweep):
        trial = tracking.start_stage("sft", {"seed": 1}, {})
    log(trial, range(20))
    tracking.end_stage(trial, {"checkpoint": "/c/first"})
    assert threading.main_thread() not in senders  # which goes on with its work
    assert "does not answer" in caplog.text
    with pytest.raises(Failure, match="does not answer"):
        tracking.runs()
    with pytest.raises(Failure, match="does not answer"):
        tracking.registered()

    server.start()
    second = tracking.start_stage("dpo", {"seed": 2}, {})
    log(second, range(10))
    while tracking.waiting():  # nobody calls anything: the thread that sends has seen the server
        time.sleep(0.1)

    server.kill()
    log(second, range(10, 20))
    tracking.end_stage(second, {"checkpoint": "/c/second"})
    tracking.end_stage(sweep, {})
    assert threading.main_thread() not in senders
    waiting = tracking.waiting()
    assert waiting >= 13
    told = CliRunner().invoke(app, ["runs", "sync"])
    assert isinstance(told.exception, Failure) and "wait" in str(told.exception)

    server.start()
    done = CliRunner().invoke(app, ["config", "show", "--preset", "tiny"], catch_exceptions=False)
    assert f"sent {waiting} entries" in done.stderr  # the next command, whichever it is
    runs = {run.stage: run for run in tracking.runs()}
    assert len(runs) == 3 and {run.status for run in runs.values()} == {"FINISHED"}
    assert runs["sft"].parent == runs["sweep"].id
    assert (runs["sft"].checkpoint, runs["dpo"].checkpoint) == ("/c/first", "/c/second")
    for run in (runs["sft"], runs["dpo"]):
        assert tracking.history(run, "loss") == [(step, 1 / (step + 1)) for step in range(20)]
    assert tracking.waiting() == 0
    lineage = Lineage(stage="sft", spec_hash="123")
    checkpoint = Checkpoint(uri="/c/first", experiment={}, lineage=lineage)
    assert tracking.register(checkpoint, alias="champion") == "1"  # a server takes no local path as it is
    assert tracking.locate("registry://mu2llm@champion") == "/c/first"
    assert capfd.readouterr().out == ""  # MLflow would tell where runs can be viewed, in the midst of a command's JSON


def test_a_server_that_takes_connections_and_never_answers_slows_nothing(monkeypatch, senders):
    """Only its end waits, as long as it may and no longer: this test would not end."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setitem(sender.FLUSH_S, True, 1.0)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as hanging:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{hanging.getsockname()[1]}")
        run = tracking.start_stage("sft", {}, {})
        log(run, range(50))
        tracking.end_stage(run, {})
        assert threading.main_thread() not in senders
        assert tracking.waiting() == 52

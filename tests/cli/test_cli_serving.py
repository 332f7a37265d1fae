"""The commands of the service: what they refuse, keys, the Serve config. A real start and stop: tests/serving."""

import json
import socket

import pytest
import yaml
from small_service import free_port
from typer.testing import CliRunner

from mu2llm.cli import app
from mu2llm.errors import UserError


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracking.db")


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from small_writer import FIRST, write_checkpoint

    return write_checkpoint(str(tmp_path_factory.mktemp("cli") / "first"), FIRST)


def test_there_is_nothing_to_serve(tmp_path):
    for arguments, words in (((), "mu2llm promote"), (("--checkpoint", tmp_path), "is not a checkpoint")):
        result = run("serve", *arguments)
        assert isinstance(result.exception, UserError) and words in str(result.exception)


def test_what_keeps_it_from_starting(checkpoint):
    keys_alone = ("--set", "serving.authentication=on", "--port", free_port())
    result = run("serve", "--checkpoint", checkpoint, *keys_alone)
    assert isinstance(result.exception, UserError) and "mu2llm key make" in str(result.exception)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("serve", "--checkpoint", checkpoint, "--port", taken.getsockname()[1])
    assert isinstance(result.exception, UserError) and "give another --host or --port" in str(result.exception)


def test_keys_are_made_listed_and_revoked():
    made = json.loads(run("key", "make", "--name", "room", "--scope", "read", "--scope", "correct", "--json").stdout)
    assert made["key"].startswith("mu2_")
    listed = run("key", "list", "--json").stdout
    (identity,) = json.loads(listed)
    assert json.loads(listed)[identity]["scopes"] == ["read", "correct"]
    assert made["key"].rpartition("_")[2] not in listed and "sha256" not in listed
    run("key", "revoke", identity)
    assert json.loads(run("key", "list", "--json").stdout) == {}
    assert isinstance(run("key", "revoke", identity).exception, UserError)


def test_the_serve_config_is_printed():
    told = yaml.safe_load(run("serve-config", "--preset", "paper").stdout)
    assert told["applications"][0]["import_path"] == "mu2llm.serving.app:build"


def test_a_tracking_servers_password_stays_out_of_the_serve_config(monkeypatch):
    for store, written in (("http://mlflow:5000", True), ("http://reader:hunter2@mlflow:5000", False)):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        told = run("serve-config", "--preset", "paper").stdout
        assert (store in told) == written
        assert "hunter2" not in told

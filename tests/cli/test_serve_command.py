"""`mu2llm serve`: what it prints and what it refuses, without starting anything."""

import contextlib

import pytest
from ray.serve.config import HTTPOptions

from mu2llm import private_apis
from mu2llm.cli import serving
from mu2llm.errors import UserError
from mu2llm.serving import running
from mu2llm.serving.keys import hash_of


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Runs the command; the settings that the application would have got."""
    started = []

    @contextlib.contextmanager
    def run(settings, host, port):
        started.append(settings)
        yield f"http://{host}:{port}"

    monkeypatch.setattr(serving, "_check_checkpoint", lambda _: None)
    monkeypatch.setattr(serving.signal, "signal", lambda *_: None)
    monkeypatch.setattr("mu2llm.cluster.session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(running, "check", lambda *_: None)
    monkeypatch.setattr(running, "running", run)
    monkeypatch.setattr(running, "watch", lambda: None)

    def go(*set_, host="127.0.0.1"):
        serving.serve(str(tmp_path), host, 8000, "tiny", [f"serving.state={tmp_path}", *set_], None, False)
        return started.pop()

    return go


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_token_always(serve, capfd, monkeypatch, host):
    """By the address alone the service was open where a reverse proxy stands before it."""
    monkeypatch.delenv(serving.TOKEN, raising=False)
    settings = serve(host=host)
    token = "".join(capfd.readouterr()).partition("/#token=")[2].partition(" ")[0]
    assert len(token) > 30 and settings.token_sha256 == hash_of(token)
    monkeypatch.setenv(serving.TOKEN, "chosen")
    assert serve(host=host).token_sha256 == hash_of("chosen")
    assert "/#token=chosen " in "".join(capfd.readouterr())


@pytest.mark.parametrize("word", ["on", "off"])
def test_no_token_where_keys_alone_open_it_or_nothing_does(serve, capfd, word):
    assert serve(f"serving.authentication={word}").token_sha256 == ""
    assert "token" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("there", [{"port": 9000}, {"host": "0.0.0.0"}, {"root_path": "/reports"}])
def test_a_serve_that_listens_otherwise_is_left_alone(monkeypatch, there):
    """It went on listening as before, and the address that was printed was of nobody."""
    asked = HTTPOptions(host="127.0.0.1", port=8000)
    monkeypatch.setattr(private_apis, "running_http_options", lambda: asked.model_copy(update=there))
    with pytest.raises(UserError, match=next(iter(there))):
        running._check_running(asked)
    for same in (asked, None):
        monkeypatch.setattr(private_apis, "running_http_options", lambda same=same: same)
        running._check_running(asked)

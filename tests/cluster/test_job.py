"""What a job prints is what the client shows."""

import pytest
import ray

from mu2llm.cluster import job, session, submission
from mu2llm.errors import UserError


def followed(texts):
    """(lines, progress) that a log gives, arriving in these pieces."""
    lines, shown = [], []
    reader = submission._LogLines(lines.append, lambda *told: shown.append(told))
    for text in texts:
        reader.feed(text)
    reader.finish()
    return lines, shown


def test_progress_comes_through_as_it_was_told(capsys):
    told = job.Lines()
    told.training("sft")({"step": 60, "total": 60, "loss": 1.25, "samples_per_second": 3.0, "data_wait_share": 0.5})
    told.counting("ingest")(12, 12)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "[sft] 60/60 loss 1.25 samples/s 3 wait 0.5"
    lines, shown = followed([printed])
    assert lines == []
    numbers = {"loss": 1.25, "samples_per_second": 3.0, "data_wait_share": 0.5}
    assert shown == [("sft", 60.0, 60.0, numbers), ("ingest", 12.0, 12.0, {})]


def test_lines_are_some_seconds_apart(capsys):
    told = job.Lines()
    for done in range(1, 101):
        told("evaluate", done, 100, {})
    assert capsys.readouterr().out.splitlines() == ["[evaluate] 1/100", "[evaluate] 100/100"]


def test_lines_cut_anywhere_are_put_together():
    lines, shown = followed(["first\nsec", "ond\n[sft] 1", "/2 loss 0.5\nlast"])
    assert lines == ["first", "second", "last"]
    assert shown == [("sft", 1.0, 2.0, {"loss": 0.5})]


def test_a_log_that_begins_anew_is_not_shown_twice():
    lines = []
    reader = submission._LogLines(lines.append, None)
    reader.begin()
    reader.feed("one\ntwo\n")
    reader.begin()  # the connection was lost: the cluster sends the log from its start
    for text in ("one\n", "two\nthr", "ee\n"):
        reader.feed(text)
    reader.finish()
    assert lines == ["one", "two", "three"]


def test_nothing_is_sent_with_a_secret(tmp_path):
    """Both are refused before the client is asked for anything: there is none."""
    for arguments, environment in ((["--set", "judge.name=openai:m@http://u:pw@h/v1"], []), ([], ["HF_TOKEN=pw"])):
        with pytest.raises(UserError) as raised:
            submission.submit(None, "sft", arguments, tmp_path, environment)
        assert "pw" not in str(raised.value)


def test_addresses_of_the_other_kind_are_told_apart(monkeypatch):
    with pytest.raises(UserError, match="jobs are sent over HTTP"):
        submission.connect("127.0.0.1:6379")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(UserError, match="no cluster is named"):
        submission.connect(None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match="use `mu2llm submit`"), session("http://head:8265"):
        pass

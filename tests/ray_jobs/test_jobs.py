"""The jobs: their docstrings' lines work as they stand, and each reads what the command reads."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from mu2llm.cluster import capacity, submission
from mu2llm.config import load
from mu2llm.errors import UserError

ROOT = Path(__file__).parents[2]
JOBS = submission.names(ROOT)


def test_there_is_a_job_for_every_step():
    assert {
        *("ingest", "contrastive", "sft", "preferences", "dpo", "online", "evaluate", "pipeline"),
        *("sweep_tokenizer", "sweep_dpo", "doctor"),
    } == set(JOBS)


def commands(name: str) -> list[list[str]]:
    """The `mu2llm submit` and `ray job submit` lines of a job's docstring."""
    docstring = ast.get_docstring(ast.parse((ROOT / "ray_jobs" / f"{name}.py").read_text())) or ""
    lines = docstring.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if re.match(r"\s*(mu2llm (submit|doctor)|ray job submit) ", line)]


@pytest.mark.parametrize("name", JOBS)
def test_the_docstrings_lines_are_ready_to_run(name):
    found = commands(name)
    assert {words[0] for words in found} == {"mu2llm", "ray"}
    for words in found:
        if words[0] == "ray":
            arguments = words[words.index("--") + 1 :]
            assert arguments[:2] == ["python", f"ray_jobs/{name}.py"]
            given = submission.options(ROOT, name, arguments[2:])
        else:
            given = submission.options(ROOT, name, _without(words[3 if words[1] == "submit" else 2 :]))
        experiment = load(given["preset"], given["set_"])
        if name != "doctor":
            assert all(each.resources["CPU"] > 0 for each in capacity.asks(experiment, name).values())


def _without(words: list[str]) -> list[str]:
    """A job's own options, without those of `mu2llm submit`."""
    for option in ("--address", "--driver-cpus"):
        if option in words:
            at = words.index(option)
            words = words[:at] + words[at + 2 :]
    return words


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("sfft", [], "there are contrastive"),
        ("sft", ["--data", "shards", "--out", "s3://b/o"], "--data shards: a job runs elsewhere"),
        ("sft", ["--data", "s3://b/d", "--out", "s3://b/o", "--intt", "x"], "--intt"),
        ("sft", ["--data", "s3://b/d"], "Missing parameter: out"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(name, arguments, says):
    with pytest.raises(Exception) as raised:  # noqa: PT011  # Typer's own and ours; the message is what counts
        submission.options(ROOT, name, arguments)
    assert says in (str(raised.value) or raised.value.format_message())


def test_a_folder_without_jobs_is_named(tmp_path):
    with pytest.raises(UserError, match="checkout of mu2llm"):
        submission.options(tmp_path, "sft", [])

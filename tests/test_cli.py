"""The contract of the command line: JSON alone on stdout, one line on stderr, exit codes."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mu2llm
from mu2llm import cli
from mu2llm.ct import phantom
from mu2llm.errors import Failure, Rejection, UserError

COMMAND = Path(sys.executable).parent / "mu2llm"


def process(*arguments, stdin=None):
    """The command as a process of its own: what loads torch or joins Ray is run in this one, by `run`."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    path.write_bytes(phantom.make(0, 0).nifti())
    return path


def test_version():
    assert process("--version").stdout.strip() == mu2llm.__version__


def test_inspect_lists_scans_in_the_order_given(run, scan, tmp_path):
    broken = tmp_path / "empty.nii.gz"
    broken.write_bytes(b"")
    code, out, _ = run("inspect", broken, scan, "--json", "--save-png", tmp_path / "png")
    first, second = json.loads(out)
    assert code == 0
    assert (first["status"], second["status"]) == ("rejected", "ok")
    assert first["reason"]
    assert len(second["sha256"]) == 64
    assert (tmp_path / "png" / "scan.png").stat().st_size > 1000


def test_labels_and_parse_read_lines_and_print_a_bare_list():
    given = process("labels", "--json", stdin='\ufeff{"text": "Bilateral pleural effusion."}\n')
    assert json.loads(given.stdout)[0]["Pleural effusion"] == 1
    errors = "\n".join(f"({letter}) Kind: {int(letter == 'a')}." for letter in "abcdef")
    answer = f"[Clinically Significant Errors]:\n{errors}\n\n[Clinically Insignificant Errors]:\n{errors}\n\n"
    answer += "[Matched Findings]:\n1. y."
    parsed = json.loads(process("green", "parse", "--json", stdin=json.dumps({"text": answer})).stdout)
    assert (parsed[0]["matched"], parsed[0]["score"]) == (1, 0.5)


def test_green_score(run, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"reference": "Left pleural effusion.", "candidate": text} for text in ("Left pleural effusion.", "")]
    pairs.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scored = json.loads(run("green", "score", "--pairs", pairs, "--judge", "rules", "--json")[1])
    assert [result["score"] for result in scored["results"]] == [1.0, 0.0]
    assert (scored["n_valid"], scored["n_invalid"]) == (2, 0)


def test_dry_run_writes_nothing(run, tmp_path):
    code, out, _ = run("demo", "--dry-run", "--out", tmp_path / "out")
    assert code == 0
    assert "writes" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["config", "show", "--set", "dpo.bta=1"], "did you mean beta"),
        (["config", "show", "--preset", "nothing"], "not known"),
        (["demo", "--out", "s3://bucket/x"], "local folder"),
        (["labels", "--jsn"], "--jsn"),
        (["green", "score", "--pairs", "nowhere.jsonl"], "no such file"),
        (["generate", "--checkpoint", "nowhere", "scan.nii.gz"], "not a checkpoint"),
        (["ingest", "--manifest", "nowhere.jsonl", "--volumes", ".", "--out", "x"], "nowhere.jsonl"),
    ],
)
def test_the_users_mistakes_exit_2_with_one_line(ray_cluster, run, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2, err
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""


def test_a_mistake_is_the_processs_exit_code_and_debug_shows_where():
    mistaken = ("config", "show", "--preset", "nothing")
    done = process(*mistaken)
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" in process("--debug", *mistaken).stderr


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("give more"), 2, "give more"),
        (Failure("it broke"), 1, "it broke"),
        (Rejection("a.nii", "truncated", "it ends"), 1, "truncated"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "the disk is full"),
        (ValueError("first\nsecond"), 1, "ValueError: first"),
    ],
)
def test_what_went_wrong_is_one_line(error, code, says):
    given, line = cli.explain(error)
    assert given == code
    assert says in line
    assert "\n" not in line


def test_what_a_ray_task_raised_is_told_as_it_was(ray_cluster):
    import ray
    import ray.exceptions

    @ray.remote
    def fails():
        raise Failure("the bucket is gone")

    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(fails.remote())
    assert cli.explain(raised.value) == (1, "the bucket is gone")


def test_tables_for_people_show_nested_values(capsys):
    cli.show({"cases": np.int64(3), "rejected": {"truncated": 1}}, as_json=False)
    assert "truncated" in capsys.readouterr().out

"""Jobs on a real head with token authentication: sent, followed, stopped; what is wrong is told before work starts."""

import json
import os
import re
import signal
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import ray
from hosts import COMMAND, ROOT, ingest, mu2llm, user
from ray.job_submission import JobStatus

from mu2llm.cluster import submission

pytestmark = pytest.mark.slow


def test_a_job_is_sent_followed_and_listed(head, ingested, secret):
    shards, done = ingested
    told = json.loads(done.stdout)
    assert told["status"] == "SUCCEEDED"
    assert "ingest" in done.stderr and '"written": 24' in done.stderr
    listed = json.loads(mu2llm(head, "jobs", "list", "--json").stdout)
    entry = next(each for each in listed if each["id"] == told["job"])
    assert (entry["name"], entry["status"]) == ("ingest", "SUCCEEDED")
    logs = mu2llm(head, "jobs", "logs", told["job"], "--no-wait").stdout
    assert "[ingest] 24/24" in logs
    for text in (done.stdout, done.stderr, logs, json.dumps(listed), json.dumps(head.job(told["job"]))):
        assert head.token not in text and secret not in text
    assert not files_with(shards, head.token, secret)
    assert not files_with(head.nodes[0].folder, head.token, secret)  # logs and packages of the session


def files_with(folder, *words):
    """Files below a folder that hold one of the words."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if any(word.encode() in path.read_bytes() for word in words)]


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        ([], {"RAY_AUTH_TOKEN": "wrong"}, "refused the token"),
        ([], {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": None}, "asks for a token"),
        (["--address", "http://127.0.0.1:9"], {}, "no Ray dashboard at http://127.0.0.1:9"),
    ],
)
def test_the_users_mistakes_are_told_before_anything_is_sent(head, arguments, environment, says):
    stage = ["sft", "--preset", "tiny", "--data", "s3://bucket/shards", "--out", "s3://bucket/sft"]
    done = mu2llm(head, "submit", *stage, *arguments, **environment)
    assert done.returncode == 2, done.stderr[-2000:]
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_cluster_is_as_large_as_the_nodes_that_live(head):
    """Ray took the dead ones, which its own filter left out, for cut off, and no job was sent any more."""
    node = head.worker(64)
    head.wait_for(2)
    node.kill()
    head.wait_for(1)
    stage = ["sft", "--preset", "tiny", "--data", "s3://bucket/shards", "--out", "s3://bucket/sft"]
    done = mu2llm(head, "submit", *stage, "--set", "sft.workers=64", "--set", "sft.batch_size=64")
    assert done.returncode == 2 and "sft asks for 64 × 1 CPU, the nodes hold 2 of these" in done.stderr, done.stderr[
        -2000:
    ]


def test_what_only_the_cluster_can_know_ends_the_job_before_its_work(head, scans, tmp_path):
    """A bucket without rights: named with its mend, the job ends with the code of a user's mistake."""
    (tmp_path / "file").write_text("in the way")
    done = mu2llm(head, "submit", *ingest(scans, tmp_path / "file" / "shards"))
    assert done.returncode == 2
    assert f"write {tmp_path}/file/shards" in done.stderr and "name a folder" in done.stderr


OTHER_RAY = """
import sys
import ray
from mu2llm.cluster import submission
submission.connect(sys.argv[1])
print("the same is let in")
ray.__version__ = "2.50.0"
submission.connect(sys.argv[1])
"""


def test_other_versions_of_ray_are_refused(head):
    """In a process of its own: the token of a cluster stays with the Ray that has read it."""
    command = [sys.executable, "-c", OTHER_RAY, head.address]
    done = subprocess.run(command, env=user(head), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "the same is let in" in done.stdout, done.stderr[-2000:]
    told = rf"UserError: .*runs Ray {re.escape(ray.__version__)}, this machine 2\.50\.0"
    assert re.search(told, done.stderr), done.stderr[-2000:]


def test_a_job_is_stopped_and_ctrl_c_leaves_one_running(head, scans, tmp_path):
    command = [COMMAND, "submit", *map(str, ingest(scans, tmp_path / "stopped"))]
    process = subprocess.Popen(
        command,
        env=user(head),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        # where the tests themselves run in the background, they ignore it, and what they start would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    id = process.stderr.readline().split()[0]
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 1, told
    assert f"job {id} runs on" in told
    assert json.loads(mu2llm(head, "jobs", "stop", id, "--json").stdout)["status"] in ("STOPPED", "SUCCEEDED")
    assert mu2llm(head, "jobs", "stop", "no-such-job").returncode == 2


def test_ctrl_c_is_not_lost_in_a_finalizer(monkeypatch):
    """Python swallows what is raised there: at least one of 25 jobs was followed on to its end."""

    class Client:
        def get_address(self):
            return "http://head:8265"

        def get_job_info(self, id):
            if len(lines) == 1:
                weakref.finalize({"an object that ends at once"}, os.kill, os.getpid(), signal.SIGINT)
            return SimpleNamespace(status=JobStatus.RUNNING)

        async def tail_job_logs(self, id):
            for count in range(len(lines) + 1):
                yield f"line {count}\n"

    monkeypatch.setattr(submission, "POLL_S", 0.01)
    lines = []

    def told(line):
        lines.append(line)
        assert len(lines) < 20, "it is followed on"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            submission.follow(Client(), "a-job", told)
    finally:
        signal.signal(signal.SIGINT, before)


def test_doctor_tells_what_would_keep_a_job_from_working(head, tmp_path, secret):
    done = mu2llm(
        head,
        *("doctor", "--address", head.address, "--preset", "tiny", "--json"),
        *("--writes", tmp_path / "out", "--reads", tmp_path / "nothing"),
    )
    told = json.loads(done.stdout)
    checks = {check["name"]: check for check in told["checks"]}
    assert done.returncode == 1 and not told["ok"]
    assert checks[f"read {tmp_path}/nothing"]["status"] == "fail"
    assert "name a folder" in checks[f"read {tmp_path}/nothing"]["mend"]
    assert " ms" in checks[f"write {tmp_path}/out"]["found"]
    for name in ("packages", "ray", "resources", "nodes", "clock", "token", "tracking"):
        assert checks[name]["status"] == "ok", checks[name]
    assert not any(check["mend"] for check in told["checks"] if check["status"] == "ok")
    assert secret not in done.stdout + done.stderr

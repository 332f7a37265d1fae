"""The checks, one by one, on what nodes and storage would say; tests/cluster/test_submission.py asks a real cluster."""

import json
import time
from importlib.util import find_spec

import pytest
import ray
import ray.exceptions

from mu2llm import config, storage
from mu2llm.cluster import capacity, doctor, job
from mu2llm.errors import UserError

OURS = doctor.look("ingest")


def node(**other):
    return doctor.Node(**{"name": "10.0.0.7", **OURS, **other})


def test_nodes_with_other_versions_are_named():
    assert "ray " in doctor._same_code([node(), node()], OURS).found
    older = {**OURS["versions"], "torch": "2.1.0"}
    check = doctor._same_code([node(), node(versions=older), node(python="3.9.1")], OURS)
    assert check.status == "fail"
    assert "10.0.0.7 has torch 2.1.0" in check.found and "has Python 3.9.1" in check.found
    assert "one image" in check.mend


def test_torch_built_for_another_device_is_no_other_torch(monkeypatch):
    """The documented cluster has a head without CUDA and workers with it; every job was refused there."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    ours = doctor.look("ingest")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert ours["versions"]["torch"] == "2.13.0"
    assert doctor._same_code([node(**doctor.look("ingest"))], ours).status == "ok"


def test_what_a_node_cannot_import_is_said(monkeypatch):
    """A package that is installed and lacks a library of the system had the right version by its name."""
    monkeypatch.setitem(doctor.IMPORTS, "ingest", "mu2llm.no_such_module")
    broken = doctor.look("ingest")
    check = doctor._same_code([node(**broken)], OURS)
    assert check.status == "fail" and "10.0.0.7: ModuleNotFoundError: No module named" in check.found
    assert "the driver: ModuleNotFoundError" in doctor._same_code([], broken).found


def test_a_node_whose_answer_fails_is_named_with_its_reason(monkeypatch):
    def fails(_):
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(ray, "get", fails)
    check = doctor._same_code([doctor._answer("10.0.0.8", None, 0.0)], OURS)
    assert check.status == "fail" and "10.0.0.8: WorkerCrashedError" in check.found


def test_a_clock_is_compared_when_its_answer_arrives(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda _: {**OURS, "clock": time.time() - 40})
    assert doctor._answer("late", None, time.time()).skew_s == pytest.approx(40, abs=5)


def test_every_job_names_a_module_that_is_there():
    jobs = {*capacity.BY_JOB, *capacity.asks(config.load("tiny"), "pipeline"), "sweep_dpo", "sweep_tokenizer"}
    for job_ in jobs:
        assert find_spec(doctor.IMPORTS.get(job_, f"mu2llm.stages.{job_}")), job_


def test_a_node_that_does_not_answer_is_named():
    silent = doctor.Node(name="10.0.0.9")
    assert "10.0.0.9 did not answer" in doctor._same_code([silent], OURS).found
    assert doctor._disks([silent]).status == "warn"


@pytest.mark.parametrize(("skew", "status"), [(0.4, "ok"), (30, "warn"), (900, "fail")])
def test_clocks(skew, status):
    check = doctor._clocks([node(), node(name="late", skew_s=skew)])
    assert check.status == status
    assert ("late" in check.mend) == (status != "ok")


@pytest.mark.parametrize(("free", "status"), [(500, "ok"), (10, "warn"), (1, "fail")])
def test_disks(free, status):
    assert doctor._disks([node(disk_gib=800), node(disk_gib=free)]).status == status


@pytest.mark.slow
def test_gpu_memory_against_the_preset():
    """Each stage that trains or writes on GPUs is named, with what it needs, whether there is a GPU or not."""
    paper, least = config.load("paper"), node(gpus=[("A100", 80.0), ("L4", 24.0)])
    checks = {check.name: check for check in doctor._gpu_memory(paper, "pipeline", [least])}
    found = {"contrastive": "ok", "sft": "fail", "preferences": "ok", "dpo": "fail", "evaluate": "ok"}
    assert {name: check.status for name, check in checks.items()} == {f"gpu memory, {n}": s for n, s in found.items()}
    assert "GiB" in checks["gpu memory, sft"].found and "sft.gradient_checkpointing" in checks["gpu memory, sft"].mend
    assert all(check.status == "ok" for check in doctor._gpu_memory(paper, "sft", [node(gpus=[("H100", 80.0)])]))
    assert [check.status for check in doctor._gpu_memory(paper, "dpo", [node()])] == ["warn"]
    assert not list(doctor._gpu_memory(config.load("demo"), "pipeline", [least]))
    many = config.load("paper", ["preferences.candidates=64"])
    (writes,) = doctor._gpu_memory(many, "preferences", [least])
    assert writes.status == "fail" and "preferences.max_sequences" in writes.mend


def test_packages_that_the_sent_code_does_not_find(monkeypatch):
    assert doctor._packages().status == "ok"
    monkeypatch.setattr(doctor, "requirements", lambda: ["numpy>=99", "no-such-package>=1"])
    check = doctor._packages()
    assert check.status == "fail"
    assert "numpy" in check.found and "no-such-package missing, wanted >=1" in check.found
    with pytest.raises(UserError, match="packages: numpy"):
        doctor.refuse([check])


def test_another_ray_at_the_client_is_refused_and_other_libraries_are_said(monkeypatch):
    assert job._client_versions() == []
    monkeypatch.setenv(job.CLIENT, json.dumps({**job.versions(), "transformers": "5.0.0"}))
    assert [check.status for check in job._client_versions()] == ["warn"]
    monkeypatch.setenv(job.CLIENT, json.dumps({**job.versions(), "ray": "2.50.0"}))
    (check,) = job._client_versions()
    assert check.status == "fail" and "ray 2.50.0 at the client" in check.found


def test_storage_is_tried_and_left_as_it_was(tmp_path):
    check = doctor.writable(str(tmp_path / "new"))
    assert check.status == "ok"
    assert [word for word in ("written", "read", "listed", "deleted") if word in check.found] == check.found.split()[
        ::4
    ]
    assert not list((tmp_path / "new").iterdir())


def test_a_right_that_is_missing_is_named_with_what_worked(tmp_path):
    (tmp_path / "file").write_text("x")
    assert doctor.readable(str(tmp_path / "file")).status == "ok"
    assert doctor.readable(str(tmp_path)).status == "ok"
    missing = doctor.readable(str(tmp_path / "nothing"))
    assert missing.status == "fail" and "there is nothing" in missing.found
    assert doctor.writable(str(tmp_path / "file" / "below")).status == "fail"
    assert doctor.writable("ftp://host/x").status == "fail"


def test_a_bucket_without_rights_is_named_with_the_mend(tmp_path, monkeypatch):
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    with storage.embedded_s3(tmp_path / "s3"):
        assert doctor.writable("s3://bucket/runs").status == "ok"
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-servers-secret")
        for check in (doctor.writable("s3://bucket/runs"), doctor.readable("s3://bucket")):
            assert check.status == "fail" and "AWS_* keys" in check.mend
            assert "not-the-servers-secret" not in str(check)
    assert not list((tmp_path / "s3" / "bucket").rglob(".mu2llm-doctor-*"))


def test_a_store_that_goes_with_the_cluster_is_a_warning(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert doctor._tracking().status == "ok"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "MLFLOW_TRACKING_URI" in doctor._tracking().mend


def test_keys_of_a_store_are_not_told(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@host/mlflow")
    assert "hunter2" not in str(doctor._tracking())

"""What of a folder is sent with a job."""

import subprocess
from pathlib import Path

import pytest

from mu2llm.cluster import package
from mu2llm.errors import UserError

KEPT = ("pyproject.toml", "mu2llm/config.py", "ray_jobs/sft.py", "mine.yaml")
LEFT = (
    *("scan.nii.gz", "shards/a.parquet", "model.safetensors", "mu2llm.db", ".env", "prod.env", "key.pem"),
    *("aws_credentials.json", "my-secret.yaml", "auth_token", "tests/test_a.py", ".git-x/config", "id_rsa"),
)


@pytest.fixture
def folder(tmp_path):
    for name in (*KEPT, *LEFT):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "checkout"


def test_code_is_sent_and_neither_data_nor_secrets(folder, tmp_path):
    assert {str(path) for path in package.files(folder)} == set(KEPT)
    assert package.pack(folder, tmp_path / "into") == sum(len(name) for name in KEPT)
    assert (tmp_path / "into" / "ray_jobs" / "sft.py").read_text() == "ray_jobs/sft.py"
    assert not list((tmp_path / "into").rglob("*.env"))


def test_of_a_git_checkout_what_git_ignores_stays(folder):
    (folder / ".gitignore").write_text("mine.yaml\n")
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    assert {str(path) for path in package.files(folder)} == set(KEPT) - {"mine.yaml"}


def test_too_much_is_named(folder, tmp_path):
    (folder / "big.txt").write_bytes(bytes(3 * 2**20))
    with pytest.raises(UserError, match=r"3 MiB to send, over 1: big\.txt \(3\.0 MiB\)"):
        package.pack(folder, tmp_path / "into", limit_mib=1)
    assert not (tmp_path / "into").exists()


def test_this_checkout_is_small_enough():
    root = Path(__file__).parents[2]
    sent = package.files(root)
    assert Path("ray_jobs/pipeline.py") in sent and Path("mu2llm/presets/paper.yaml") in sent
    assert sum((root / path).stat().st_size for path in sent) < 10 * 2**20


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "openai_api_key", "DB_PASSWORD"])
def test_secrets_are_no_environment_of_a_job(name):
    with pytest.raises(UserError, match="can be read in the job list") as raised:
        package.check_environment([f"{name}=hunter2"])
    assert "hunter2" not in str(raised.value)


def test_other_variables_are():
    assert package.check_environment(["A=1", "URL=http://host/x?y=1"]) == {"A": "1", "URL": "http://host/x?y=1"}
    with pytest.raises(UserError, match="expected NAME=VALUE"):
        package.check_environment(["A"])


def test_a_password_in_a_url_is_refused_and_not_repeated():
    for text in ("judge.name=openai:m@https://user:hunter2@host/v1", "s3://key:hunter2@bucket/x"):
        with pytest.raises(UserError, match="password") as raised:
            package.check_no_secret([text])
        assert "hunter2" not in str(raised.value)
    package.check_no_secret(["judge.name=openai:model@http://localhost:8000/v1", "s3://bucket/a@b"])

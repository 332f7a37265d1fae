"""The exported algorithm keeps Grand-Challenge's contract: its entry point is run as a process, without a container."""

import json
import os
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import SimpleITK
from small_writer import FIRST, write_checkpoint
from typer.testing import CliRunner

from mu2llm import storage
from mu2llm.cli import app
from mu2llm.ct import metaimage, phantom, read
from mu2llm.errors import UserError
from mu2llm.evaluation.exports.container import main
from mu2llm.evaluation.exports.grand_challenge import grand_challenge


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The algorithm of a model that answers every scan with the same report."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint = write_checkpoint(str(folder / "checkpoint"), FIRST)
    grand_challenge(checkpoint, str(folder / "algorithm"), "chest-ct", "images/chest-ct", "report.json")
    return folder / "algorithm"


@pytest.fixture
def start(exported, monkeypatch, tmp_path):
    """Runs the entry point on a case, the platform's places moved below `tmp_path`; its exit code."""

    def run(input_):
        places = {"INPUT": input_, "OUTPUT": tmp_path / "output", "MODEL": exported / "model"}
        for name, place in places.items():
            monkeypatch.setenv(f"MU2LLM_{name}", str(place))
        return main(exported)

    return run


def put(folder, slug="chest-ct", path="images/chest-ct", images=1):
    """A case as the platform mounts it."""
    made = phantom.make(seed=1, index=4)
    (folder / path).mkdir(parents=True)
    for number in range(images):
        (folder / path / f"{number}.mha").write_bytes(metaimage.encode(made.hu, made.affine))
    about = {"title": "CT", "slug": slug, "relative_path": path, "kind": "Image", "super_kind": "Image"}
    image = {"name": "0.mha", "pk": "c0ffee"}
    value = {"pk": 1, "interface": about, "image": image, "file": None, "value": None}
    (folder / "inputs.json").write_text(json.dumps([value]))
    return folder


def test_what_is_written_is_what_itk_reads(tmp_path):
    made = phantom.make(seed=1, index=4)
    (tmp_path / "scan.mha").write_bytes(metaimage.encode(made.hu, made.affine))
    image = SimpleITK.ReadImage(str(tmp_path / "scan.mha"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), made.hu)
    corner = np.array(image.TransformIndexToPhysicalPoint([1, 2, 3])) * [-1, -1, 1]
    np.testing.assert_allclose(corner, (made.affine @ [1, 2, 3, 1])[:3], atol=1e-6)
    assert read(tmp_path / "scan.mha").sha256 == read(made.nifti()).sha256


def test_its_own_check_runs_the_entry_point_as_the_container_does(exported):
    """A process of its own, which has the folder's package and sees no network."""
    done = subprocess.run(
        [str(exported / "do_check.sh")],
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(exported / "package")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    name, report = done.stdout.split("\n", 1)
    assert name.endswith("report.json") and json.loads(report) == FIRST


def test_a_case_in_its_report_out(start, tmp_path):
    assert start(put(tmp_path / "input")) == 0
    assert [path.name for path in (tmp_path / "output").rglob("*")] == ["report.json"]
    assert json.loads((tmp_path / "output" / "report.json").read_text()) == FIRST


def test_without_inputs_json_it_is_vlm3ds(start, tmp_path, capsys):
    made = phantom.make(seed=1, index=4)
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "valid_1_a_1.mha").write_bytes(metaimage.encode(made.hu, made.affine))
    (tmp_path / "input" / "valid_2_a_1.nii.gz").write_bytes(b"")
    assert start(tmp_path / "input") == 0
    assert "valid_2_a_1.nii.gz: empty" in capsys.readouterr().err
    found = json.loads((tmp_path / "output" / "results.json").read_text())["generated_reports"]
    assert found == [
        {"input_image_name": "valid_1_a_1", "report": FIRST},
        {"input_image_name": "valid_2_a_1", "report": ""},
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"slug": "brain-mri"}, "sockets brain-mri; this algorithm takes chest-ct"),
        ({"images": 2}, "holds 2 .mha files"),
        ({"images": 0}, "holds 0 .mha files"),
    ],
)
def test_what_the_sockets_do_not_say_ends_the_job(change, told, start, tmp_path, capsys):
    assert start(put(tmp_path / "input", **change)) == 1
    said = capsys.readouterr()
    assert said.out == "" and told in said.err and len(said.err.splitlines()) == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"ObjectType = Image\nNDims = 3\n", "truncated"),
        (metaimage.encode(np.full((9, 9, 9), 7, "i2"), np.eye(4)), "not_hu"),
    ],
)
def test_a_scan_that_cannot_be_used_ends_the_job(data, told, start, tmp_path, capsys):
    case = put(tmp_path / "input")
    (case / "images" / "chest-ct" / "0.mha").write_bytes(data)
    assert start(case) == 1 and told in capsys.readouterr().err and not (tmp_path / "output").exists()


def test_an_inputs_json_that_is_none(start, tmp_path, capsys):
    case = put(tmp_path / "input")
    (case / "inputs.json").write_text('[{"socket": 1}]')
    assert start(case) == 1 and "no list of sockets" in capsys.readouterr().err


def test_what_is_in_the_folder(exported):
    docker = (exported / "Dockerfile").read_text()
    assert (
        "--platform=linux/amd64" in docker
        and "USER user" in docker
        and 'ENTRYPOINT ["python", "inference.py"]' in docker
    )
    assert docker.index("USER user") < docker.index("COPY")
    run = (exported / "do_test_run.sh").read_text()
    assert "--network none" in run and ":/input:ro" in run and ":/opt/ml/model:ro" in run
    for script in exported.glob("*.sh"):
        assert os.access(script, os.X_OK)
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    for text in (exported / "README.md", exported / "Dockerfile"):
        assert "{{" not in text.read_text()
    pinned = dict(line.split("==") for line in (exported / "requirements.txt").read_text().split())
    assert {"torch", "transformers", "pydicom", "isal"} <= set(pinned) and "pytest" not in pinned
    project = tomllib.loads((exported / "package" / "pyproject.toml").read_text())
    assert project["project"]["name"] == "mu2llm"
    assert (exported / "package" / "mu2llm" / "green" / "lexicon.yaml").is_file()
    assert not list((exported / "package").rglob("__pycache__"))
    assert {path.name for path in (exported / "model").iterdir()} >= {"config.json", "mu2llm.json", "model.safetensors"}
    assert json.loads((exported / "sockets.json").read_text()) == {"input": "chest-ct", "output": "report.json"}


def test_names_that_are_no_sockets(checkpoints, tmp_path):
    out = str(tmp_path / "out")
    for given in (("CT image", "images/ct", "r.json"), ("ct", "../ct", "r.json"), ("ct", "images/ct", "/etc/r.json")):
        with pytest.raises(UserError, match="expected a"):
            grand_challenge(checkpoints["sft"], out, *given)
    with pytest.raises(UserError, match="local folder"):
        grand_challenge(checkpoints["sft"], "s3://bucket/out", "ct", "images/ct", "r.json")
    with pytest.raises(UserError, match=r"not a checkpoint|no language model"):
        grand_challenge(str(tmp_path), out, "ct", "images/ct", "r.json")
    assert not storage.exists(out)


def test_the_command_says_where(checkpoints, tmp_path):
    command = ["export", "grand-challenge", "--checkpoint", checkpoints["sft"], "--out", str(tmp_path / "a"), "--json"]
    told = json.loads(CliRunner().invoke(app, command).stdout)
    assert (
        told["input"] == "ct-image" and (tmp_path / "a" / "test" / "input" / "images" / "ct" / "phantom.mha").exists()
    )
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, UserError)

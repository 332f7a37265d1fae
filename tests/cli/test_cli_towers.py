"""`mu2llm towers`: what is listed, and what a check of weights says."""

import json

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from mu2llm import cli, config
from mu2llm.errors import Failure
from mu2llm.model.building import vision_configuration
from mu2llm.model.vision import VisionEncoder

SMALL = [
    *("--set", "model.vision.sizes={width: 24, depth: 1, heads: 2, projection: 16}"),
    *("--set", "data.spec={name: colipri, grid: [32, 32, 32], spacing_mm: [12, 12, 12]}"),
]


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["towers", *arguments], catch_exceptions=True)


def test_every_tower_is_listed_with_its_licence_and_shapes():
    rows = {row["name"]: row for row in json.loads(invoke("list", "--json").stdout)}
    assert list(rows) == ["m3d", "colipri", "ct_fm", "merlin", "spectre"]
    assert {"licence", "input", "output", "weights"} <= set(rows["colipri"])
    assert (
        rows["colipri"]["output"] == {"grid": [24, 24, 24], "width": 768}
        and rows["spectre"]["licence"] == "CC BY-NC-SA"
    )
    assert "RAS, 2×2×2 mm, 192×192×192" in rows["colipri"]["input"] and rows["ct_fm"]["installed"]
    assert "merlin" in invoke("list").stdout


@pytest.fixture
def weights(tmp_path):
    settings = config.load("paper", ["model.vision.tower=colipri", "model.vision.pooling=1", SMALL[1], SMALL[3]])
    encoder = VisionEncoder(vision_configuration(settings.model, settings.data.spec))
    tensors = {name.replace("tower.", "image_encoder."): tensor for name, tensor in encoder.state_dict().items()}
    save_file(tensors, tmp_path / "whole.safetensors")
    backbone = {n.removeprefix("image_encoder.backbone."): t for n, t in tensors.items() if ".backbone." in n}
    save_file(backbone, tmp_path / "backbone.safetensors")
    tensors.pop("image_encoder.backbone.eva.norm.bias")
    save_file(
        {**tensors, "image_encoder.more": tensors["image_encoder.projector.bias"].clone()},
        tmp_path / "part.safetensors",
    )
    return tmp_path


@pytest.mark.parametrize(("file", "width"), [("whole", 16), ("backbone", 24)])
def test_weights_that_fit_are_loaded_and_see_a_phantom(weights, file, width):
    done = invoke("check", "colipri", "--weights", str(weights / f"{file}.safetensors"), *SMALL, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["missing"], found["unused"], found["shape"]) == ([], [], [1, 4, 4, 4, width])
    assert found["finite"] and found["std"] > 0 and 1 < found["effective_rank"] <= width


def test_names_that_do_not_fit_are_told_and_end_in_a_failure(weights):
    done = invoke("check", "colipri", "--weights", str(weights / "part.safetensors"), *SMALL, "--json")
    found = json.loads(done.stdout)
    assert found["missing"] == ["tower.backbone.eva.norm.bias"] and found["unused"] == ["tower.more"]
    assert isinstance(done.exception, Failure)

"""Each tower against its own published implementation: the same weights, the same volumes, the same features."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import experiment

from mu2llm import config, ct
from mu2llm.errors import UserError
from mu2llm.model import Mu2ForContrastive, build, build_contrastive, load_vision, published
from mu2llm.model.configuration import Mu2VisionConfig
from mu2llm.model.modeling import Mu2ForConditionalGeneration
from mu2llm.model.towers import loading
from mu2llm.model.vision import VisionEncoder
from mu2llm.settings.towers import TOWERS, TowerSpec, tower_spec

PACKAGES = Path(sys.prefix) / "towers"
SMALL = {
    "colipri": {"width": 36, "depth": 2, "heads": 3, "projection": 24},
    "ct_fm": {"filters": 4},
}
SIZES = {  # of the scans that are prepared: one smaller than any grid, one larger where that is not too large
    "colipri": [((70, 61, 33), (3.1, 2.7, 7.3)), ((205, 190, 91), (2.3, 2.1, 5.0))],
    "ct_fm": [((61, 70, 40), (1.5, 1.5, 2.0))],
    "merlin": [((70, 61, 33), (3.1, 2.7, 7.3)), ((225, 170, 177), (1.7, 2.3, 3.4))],
    "spectre": [((150, 300, 131), (0.8, 0.8, 1.0))],
}


def scan(path, shape, spacing, seed=0):
    """Smooth tissue within air, stored as LPS in int16."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 400, [size // 8 + 2 for size in shape])
    for axis, size in enumerate(shape):
        places = np.linspace(0, coarse.shape[axis] - 1.001, size)
        low = places.astype(int)
        share = (places - low).reshape([-1 if i == axis else 1 for i in range(3)])
        coarse = np.take(coarse, low, axis) * (1 - share) + np.take(coarse, low + 1, axis) * share
    coarse[:4] = coarse[:, :3] = coarse[:, :, -2:] = -2000
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = (100, 80, -50)
    nib.Nifti1Image(np.clip(coarse, -1024, 2000).astype(np.int16), affine).to_filename(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with what a tower's published implementation makes, made once."""
    folders = {}

    def make(name):
        if not (PACKAGES / "timm").is_dir():
            pytest.skip(f"{PACKAGES} does not hold the published towers: make setup")
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            for number, (shape, spacing) in enumerate(SIZES[name]):
                scan(folder / f"{number}.nii", shape, spacing, number)
            script, root = Path(__file__).with_name("published_towers.py"), Path(__file__).parents[2]
            environment = {**os.environ, "PYTHONPATH": f"{PACKAGES}:{root}"}
            run = [sys.executable, "-W", "ignore", str(script), name, str(folder)]
            done = subprocess.run(run, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            folders[name] = folder
        return folders[name]

    return make


def encoder(name, shape, sizes=None):
    spec = tower_spec(name, None, sizes)
    return VisionEncoder(
        Mu2VisionConfig(
            **{"tower": name, "sizes": sizes, "chunks": 1, "chunk_shape": shape, "hidden_size": spec.width},
            **{"patch_size": spec.stride, "class_token": False, "pooling": 1},
        )
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "sizes", "features"),
    [
        ("colipri", "model.safetensors", {}, "features"),
        ("colipri", "primus.safetensors", {"projection": 0}, "plain"),
        ("ct_fm", "model.safetensors", {}, "features"),
        ("ct_fm", "model.pt", {}, "features"),
    ],
)
def test_a_tower_gives_the_features_of_its_published_implementation(made, name, file, sizes, features):
    folder = made(name)
    known = load_file(folder / "features.safetensors")
    ours = encoder(name, tuple(known["volume"].shape[2:]), {**SMALL[name], **sizes})
    found = loading.find(name, folder / file)
    assert published.differences(ours, found.tensors) == {"missing": [], "unused": []}
    assert all(left.startswith("text_encoder.") for left in found.left)
    ours.load_state_dict(found.tensors)
    with torch.no_grad():
        given = ours(known["volume"][:, None])[:, 0]
    assert given.shape == known[features].shape and known[features].std() > 0.1
    assert (given - known[features]).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merlin", "spectre"])
def test_a_tower_of_a_package_gives_its_features_behind_the_converter(made, name):
    known = load_file(made(name) / "features.safetensors")
    assert known["features"].std() > 0.01
    assert (known["ours"] - known["features"]).abs().max() < 1e-4 * max(1, float(known["features"].abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_scan_is_prepared_as_the_published_transform_does(made, name):
    """To what float16 and the packages' own rounding to whole HU leave: 1 HU and a half."""
    folder, tower = made(name), TOWERS[name]
    low, high = tower.scale
    (window,) = tower.windows
    for number in range(len(SIZES[name])):
        known = load_file(folder / f"{number}.volume.safetensors")["volume"].numpy()
        spec = config.load("demo", [f"model.vision.tower={name}"]).data.spec
        prepared = ct.prepare(ct.read(folder / f"{number}.nii"), spec)
        ours = prepared.voxels[:, 0].astype(np.float32) * (high - low) + low
        if name == "spectre":
            ours = ours[prepared.chunk_mask]
        elif name == "ct_fm":  # the whole of it, as large as it is, in the middle of ours
            whole = ours.reshape(spec.grid)
            start = [(grid - size) // 2 for grid, size in zip(spec.grid, known.shape, strict=True)]
            ours = whole[tuple(slice(at, at + size) for at, size in zip(start, known.shape, strict=True))]
            assert whole.sum() == pytest.approx(ours.sum())
        else:
            ours = ours[0]
        assert ours.shape == known.shape
        assert np.abs(ours - known).max() < 1.5 * (high - low) / (window[1] - window[0])
        assert known.std() > 0.05 * (high - low)


def tiny_colipri():
    """A chunk of 16³ for a COLIPRI of least size."""
    base = experiment().model_dump(mode="json")
    base["model"]["vision"] = {"tower": "colipri", "sizes": SMALL["colipri"], "pooling": 1}
    base["data"]["spec"] = {"name": "colipri", "grid": [16, 16, 16]}
    return config.validate(base)


def test_a_tower_brings_its_spec_and_what_it_does_not_leave_open_is_refused():
    settings = config.load("demo", ["model.vision.tower=merlin", "model.vision.pooling=1"])
    assert settings.data.spec.name == "merlin" and settings.data.spec.shape == (1, 1, 224, 224, 160)
    assert settings.model.vision.hidden_size == 2048 and settings.model.vision.num_layers == 12
    assert config.validate(settings.model_dump(mode="json")) == settings
    smaller = config.load("demo", ["model.vision.tower=merlin", "data.spec={name: merlin, grid: [64, 64, 32]}"])
    assert smaller.data.spec.shape == (1, 1, 64, 64, 32) and smaller.data.spec.spacing_mm == (1.5, 1.5, 3)
    for wrong, says in (
        ("data.spec={name: merlin, windows: [[-1000, 400]]}", r"tower merlin takes windows \(\(-1000\.0, 1000\.0\),\)"),
        ("data.spec={name: merlin, axes: SAR}", "tower merlin takes axes RAS, data.spec has SAR"),
        ("model.vision.sizes.depth=3", "depth is no size of tower merlin"),
        ("model.vision.own=python:a:B", "own names a class, but the tower is merlin"),
    ):
        with pytest.raises(UserError, match=says):
            config.load("demo", ["model.vision.tower=merlin", wrong])
    with pytest.raises(UserError, match="tower own needs python:MODULE:CLASS"):
        config.load("demo", ["model.vision.tower=own"])
    with pytest.raises(UserError, match="sizes are of other towers"):
        config.load("demo", ["model.vision.sizes.depth=3"])


def test_m3d_says_nothing_new_in_its_configuration_and_specs():
    text = Mu2VisionConfig(chunk_shape=(8, 32, 32)).to_dict()
    assert not {"tower", "own", "sizes", "tiles"} & set(text)
    assert not {"axes", "tiles"} & set(config.load("demo").data.spec.model_dump())
    assert config.load("demo").data.spec.hash == "79f6ba52b3e5"


def test_a_whole_model_on_a_tower_is_saved_and_loaded(tmp_path):
    settings = tiny_colipri()
    model, _ = build(settings.model, settings.data.spec, ["A report."] * 8)
    for parameter in model.model.vision.parameters():
        assert parameter.isfinite().all()
    volumes = torch.rand(1, *settings.data.spec.shape)
    features = model.encode_vision(volumes)
    assert features.shape == (1, 1, 8, 24)
    model.save_pretrained(tmp_path / "saved")
    again = Mu2ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.encode_vision(volumes), features)
    contrastive = build_contrastive(
        settings.model, settings.data.spec, settings.contrastive, 8, str(tmp_path / "saved")
    )
    assert torch.equal(contrastive.encode_vision(volumes, torch.ones(1, 1, dtype=torch.bool)), features)
    contrastive.save_pretrained(tmp_path / "contrastive")
    other = Mu2ForContrastive.from_pretrained(tmp_path / "contrastive")
    assert torch.equal(other.encode_vision(volumes), features)


def test_weights_without_a_part_or_of_another_tower_are_refused(tmp_path):
    settings = tiny_colipri()
    model = build_contrastive(settings.model, settings.data.spec, settings.contrastive, 8)
    own = {name.removeprefix("tower."): t for name, t in model.vision.state_dict().items()}
    plain = {name.removeprefix("backbone."): t for name, t in own.items() if name.startswith("backbone.")}
    save_file(plain, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match=r"such as tower\.pooler.*model\.vision\.sizes=\{projection: 0\}"):
        load_vision(model, str(tmp_path / "plain.safetensors"))
    save_file({"conv_init.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no weights of tower colipri: expected names from image_encoder"):
        load_vision(model, str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="there are no weights; give a path"):
        load_vision(model, str(tmp_path / "absent" / "x.safetensors"))
    save_file({f"image_encoder.{name}": t for name, t in own.items()}, tmp_path / "whole.safetensors")
    load_vision(model, str(tmp_path / "whole.safetensors"))


class Own(torch.nn.Module):
    """Means of cubes of 8³, in the two numbers that the scale makes visible."""

    spec = TowerSpec(
        name="means", about="a test", axes="RAS", scale=(-1, 1), grid=(16, 16, 16), stride=(8, 8, 8), width=2,
        sizes={"factor": 3.0},
    )  # fmt: skip

    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor([factor]))

    def forward(self, x):
        means = torch.nn.functional.avg_pool3d(x, 8).flatten(2).transpose(1, 2)
        return torch.cat([means, means * self.factor], dim=-1)


def test_a_tower_of_ones_own_by_its_class():
    base = experiment().model_dump(mode="json")
    base["model"]["vision"] = {"tower": "own", "own": "python:test_towers:Own", "sizes": {"factor": 2.0}, "pooling": 1}
    settings = config.validate(base)
    assert settings.data.spec.name == "means" and settings.data.spec.shape == (1, 1, 16, 16, 16)
    model, _ = build(settings.model, settings.data.spec, ["A report."] * 8)
    given = model.encode_vision(torch.full((1, 1, 1, 16, 16, 16), 0.75))
    assert torch.allclose(given, torch.tensor([0.5, 1.0]).expand(1, 1, 8, 2))
    base["model"]["vision"]["own"] = "python:test_towers:Nothing"
    with pytest.raises(UserError, match="give python:MODULE:CLASS that can be imported"):
        config.validate(base)

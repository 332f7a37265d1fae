"""The whole way on a frozen open tower: its spec, features made once, a projection by contrast, reports, scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mu2llm import config
from mu2llm.cases import Shards
from mu2llm.engine.features import encode_scans, read_scans
from mu2llm.engine.loading import load_encoder
from mu2llm.errors import UserError
from mu2llm.evaluation.evaluate import evaluate
from mu2llm.evaluation.probe import probe
from mu2llm.evaluation.promotion import card
from mu2llm.model import build_contrastive, load
from mu2llm.stages import contrastive, sft, tower
from mu2llm.stages.job import new_job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("actors_here")]

TOWER = [
    "model.vision.tower=colipri",
    "model.vision.sizes={width: 24, depth: 1, heads: 2, projection: 16}",
    "model.vision.pooling=2",
    "data.spec={name: colipri, grid: [32, 32, 32], spacing_mm: [12, 12, 12]}",
    *("contrastive.freeze_vision=true", "contrastive.workers=0", "sft.freeze_vision=true", "sft.workers=0"),
]


def experiment(*overrides):
    return config.load("tiny", [*TOWER, *overrides])


def features_of(shards):
    return sorted(path.parent.name for path in Path(shards, "features").glob("*/shards.json"))


def vision(checkpoint):
    """The vision tensors of a checkpoint, by one name in any stage."""
    tensors = load_file(f"{checkpoint.uri}/model.safetensors").items()
    return {n.removeprefix("model."): t for n, t in tensors if n.startswith(("vision.", "model.vision."))}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_from_scans_to_scored_reports_by_features_that_are_made_once(shards, place):
    opened = Shards.open(shards)
    assert opened.spec.name == "colipri" and opened.spec.shape == (1, 1, 32, 32, 32)
    projected = contrastive.run(shards, str(place / "contrastive"), experiment())
    first = projected.training.history[0]["loss"]
    assert projected.training.history[-1]["loss"] < first and projected.training.metrics["recall_n"] > 0
    assert projected.lineage.tower == "colipri (MIT)"
    (made,) = features_of(shards)
    table = Shards.open(f"{shards}/features/{made}")
    encoder = load_encoder(projected.uri)
    for split in ("train", "validation", "test"):
        assert table.cases(split) == opened.cases(split)
        rows = np.arange(opened.count(split))
        (kept, _), (features, _) = (read_scans(encoder, each, split, rows) for each in (table, opened))
        torch.testing.assert_close(kept, features, atol=1e-3, rtol=1e-3)
    after_a_kill(projected.uri, opened, made)
    written = sft.run(shards, str(place / "sft"), experiment(), projected.uri)
    assert features_of(shards) == [made]  # SFT read what contrast had made
    assert same(vision(projected), vision(written))
    scored = evaluate(written.uri, shards, str(place / "evaluated"), experiment())
    assert scored is not None and (place / "evaluated").is_dir()
    assert load(written.uri)[1].spec == opened.spec
    assert "colipri (MIT)" in card(written, [])


def after_a_kill(checkpoint, shards, made):
    """Of features of which the last split is missing that one alone is made, and nothing is deleted."""
    folder = Path(shards.uri, "features", made)
    whole = Shards.open(str(folder))
    (folder / "shards.json").unlink()
    for path in (folder / "test").iterdir():
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet") if path.parent != folder}
    told = []
    again = encode_scans(checkpoint, shards, experiment().evaluation, lambda done, _: told.append(done))
    assert told[0] > shards.count("train") + shards.count("validation") and len(before) > 1
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.uri == str(folder) and again.checksum == whole.checksum


def test_published_weights_are_where_a_frozen_tower_starts(shards, place):
    settings = experiment(f"model.vision.weights={place}/tower.safetensors", "sft.max_steps=1", "sft.warmup=0")
    spec = Shards.open(shards).spec
    model = build_contrastive(experiment().model, spec, settings.contrastive, 4, seed=5)
    tensors = {n.replace("tower.", "image_encoder."): t for n, t in model.vision.state_dict().items()}
    save_file(tensors, place / "tower.safetensors")
    written = sft.run(shards, str(place / "direct"), settings)
    assert same(vision(written), {f"vision.{name}": tensor for name, tensor in model.vision.state_dict().items()})
    assert len(features_of(shards)) == 2 and written.lineage.tower == "colipri (MIT)"
    probed = probe(tower.of_weights(Shards.open(shards), f"{place}/tower.safetensors", []), shards)
    assert len(features_of(shards)) == 2 and probed.width == 16 and 1 < probed.effective_rank <= 16
    assert probed.macro_zero_shot_auroc is None  # there is no head yet
    assert probed.macro_auroc is not None and probed.n["test"] == Shards.open(shards).count("test")
    with pytest.raises(UserError, match="there are no weights; give a path"):
        tower.of_weights(Shards.open(shards), f"{place}/absent.safetensors", [])


def test_another_spec_or_tower_is_refused_by_name(shards, place):
    merlin = config.load("tiny", ["model.vision.tower=merlin", "model.vision.pooling=1"])
    with pytest.raises(UserError, match=r"has spec colipri \(.*\), preset tiny expects merlin"):
        new_job("contrastive", Shards.open(shards), str(place / "no"), merlin)
    other = experiment("model.vision.sizes={width: 36, depth: 1, heads: 2, projection: 16}")
    with pytest.raises(UserError, match=r"model\.vision\.sizes\.width is 24 there, 36 here"):
        new_job("sft", Shards.open(shards), str(place / "no"), other, str(place / "contrastive"))

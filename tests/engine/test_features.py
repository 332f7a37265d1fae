"""Features that are made once and shared."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import make

from mu2llm import artefacts, storage
from mu2llm.cases import Shards
from mu2llm.cases.shards import read_rows, write_derived
from mu2llm.engine import features as encoding
from mu2llm.engine.actors import actor_pool
from mu2llm.engine.features import VisionActor, cached_features, features_uri
from mu2llm.errors import Failure
from mu2llm.settings.inference import InferenceConfig


def saved(uri, *changes, **given):
    """A model's weights and config, as a stage publishes them; its digests."""
    model, _ = make(0, **given)
    for change in changes:
        change(model)
    model.save_pretrained(uri)
    return artefacts.folder_weights(str(uri))


def test_features_are_shared_by_the_same_vision_alone(tmp_path):
    """The same weights pooled otherwise give other features: they were once read for one another."""

    def trained(model):
        with torch.no_grad():
            model.lm_head.weight += 1

    one, same = saved(tmp_path / "one"), saved(tmp_path / "same", trained)
    assert one.vision == same.vision and one.weights != same.weights
    model, _ = make(0)
    pooled = saved(
        tmp_path / "pooled", lambda other: other.model.vision.load_state_dict(model.model.vision.state_dict()),
        vision={"pooling": 1},
    )  # fmt: skip
    assert pooled.vision != one.vision


def test_features_are_read_where_a_stage_has_computed_them_and_not_computed_to_be_read(shards, checkpoints):
    sft, dpo = checkpoints.values()
    assert cached_features([sft], shards) is None
    assert not storage.exists(storage.join(shards.uri, "features"))
    made = features_uri(sft, shards)
    assert features_uri(sft, shards, "bf16") != made
    storage.write_bytes(storage.join(made, "shards.json"), storage.read_bytes(storage.join(shards.uri, "shards.json")))
    try:
        assert cached_features([sft], shards) == made
        assert Shards.open(made).count("test") == shards.count("test")
        assert cached_features([sft, dpo], shards) is None  # another vision, without any yet
        grown = Shards(shards.uri, shards.index.model_copy(update={"checksum": "with more scans"}))
        assert cached_features([sft], grown) is None
    finally:
        storage.delete(storage.join(shards.uri, "features"))


def test_as_many_actors_as_are_asked_for_or_fit_but_no_more_than_there_is_work():
    assert (actor_pool(4, 2).min_size, actor_pool(4, 2).max_size) == (2, 2)
    assert (actor_pool(1, 9).min_size, actor_pool(1, 9).max_size) == (1, 1)
    assert (actor_pool(None, 9).min_size, actor_pool(None, 9).max_size) == (1, 9)


@pytest.mark.parametrize(("value", "told"), [(7e4, r"of b .* reach 7e\+04, more than float16"), (np.nan, "reach nan")])
def test_features_that_cannot_be_kept_end_the_encoding_by_name(value, told, monkeypatch):
    """A number that is none was kept: it is larger than nothing."""

    def encode(scans, mask):
        return torch.full((len(scans), 2, 3, 4), 1.0).index_fill(3, torch.tensor([2]), float(scans.max()))

    actor = vision_actor(monkeypatch, encode)
    batch = {name: np.array(["b", "c"]) for name in ("id", "report", "questions")}
    batch |= {"voxels": np.ones((2, 1), np.float32), "chunk_mask": np.ones((2, 2), bool)}
    given = actor.encode(batch)["features"]
    assert given.dtype == np.float16 and (given == 1).all()
    with pytest.raises(Failure, match=told):
        actor.encode({**batch, "voxels": np.full((2, 1), value, np.float32)})


def vision_actor(monkeypatch, encode, shards=None, uri="", run=""):
    """An actor in this process, with an encoder that is a function."""
    encoder = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, encode_vision=encode)
    monkeypatch.setattr(encoding, "load_encoder", lambda *_: encoder)
    return VisionActor("checkpoint", InferenceConfig(batch_size=3), shards, uri, run)


def test_actors_write_features_themselves_and_what_is_there_is_not_made_again(shards, monkeypatch, tmp_path):
    """All features went through the driver, 160 GB of them for CT-RATE."""

    def encode(scans, mask):
        return scans.float().mean((2, 4, 5))[..., None]  # (B, T, K, 1)

    monkeypatch.setattr(encoding, "FILE_SCANS", 4)
    uri, parts = str(tmp_path / "features"), encoding._parts("test", 10)
    assert [(each.first, each.end) for each in parts] == [(0, 4), (4, 8), (8, 10)]
    actor = vision_actor(monkeypatch, encode, shards, uri, "one")
    batch = {name: np.array([getattr(part, name) for part in parts[1:]]) for name in parts[0]._fields}
    given = actor(batch)
    assert set(given) == {"split", "first", "end", "file"} and sum(map(len, given["file"])) < 1000  # to the driver
    assert not list(encoding._finished(str(tmp_path / "none"), shards, {"test": 10}))
    there = encoding._finished(uri, shards, {"test": 10})
    assert list(there) == parts[1:] and [file.rows for file in there.values()] == [4, 2]
    assert there[parts[2]].model_dump_json() == given["file"][1]
    others = SimpleNamespace(ids=lambda split: [f"other-{n}" for n in range(10)])
    assert not encoding._finished(uri, others, {"test": 10})
    actor({name: np.array([value]) for name, value in parts[0]._asdict().items()})
    files = encoding._finished(uri, shards, {"test": 10})
    made = write_derived(uri, {"test": [files[part] for part in parts]}, shards, checkpoint="c")
    assert made.rows("test") == [4, 4, 2] and made.cases("test") == shards.cases("test")
    assert made.origin_checksum == shards.checksum and Shards.open(uri).checksum == made.checksum
    rows = np.arange(10)
    voxels = read_rows(shards.files("test"), shards.rows("test"), ["id", "voxels"], rows)
    kept = read_rows(made.files("test"), made.rows("test"), ["id", "features"], rows)
    assert kept["id"].tolist() == voxels["id"].tolist()
    wanted = encode(torch.from_numpy(np.array(voxels["voxels"])), None).to(torch.float16).numpy()
    np.testing.assert_array_equal(kept["features"], wanted)

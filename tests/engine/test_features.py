"""Features that are made once and shared."""

from small_models import make, scans

from mu2llm import storage
from mu2llm.artefacts import folder_weights
from mu2llm.cases import Shards
from mu2llm.engine.actors import actor_pool
from mu2llm.engine.features import cached_features, features_uri


def test_features_are_shared_by_the_same_vision_alone(tmp_path, shards, checkpoints):
    """The same weights pooled otherwise give other features: they were once read for one another."""
    (one, _), (same, _), (other, _) = make(0), make(0), make(0, vision={"pooling": 1})
    other.model.vision.load_state_dict(one.model.vision.state_dict())
    shapes = [model.encode_vision(scans(1)).shape for model in (one, other)]
    assert shapes[0] != shapes[1]
    digests = []
    for name, model in {"one": one, "same": same, "other": other}.items():
        model.save_pretrained(tmp_path / name)
        digests.append(folder_weights(str(tmp_path / name)).vision)
    assert digests[0] == digests[1] != digests[2]


def test_features_are_read_where_a_stage_has_computed_them_and_not_computed_to_be_read(shards, checkpoints):
    sft, dpo = checkpoints.values()
    assert cached_features([sft], shards) is None
    assert not storage.exists(storage.join(shards.uri, "features"))
    place = features_uri(sft, shards)
    assert features_uri(sft, shards, "bf16") != place
    storage.write_bytes(storage.join(place, "shards.json"), storage.read_bytes(storage.join(shards.uri, "shards.json")))
    try:
        assert cached_features([sft], shards) == place
        assert Shards.open(place).count("test") == shards.count("test")
        assert (cached_features([sft, dpo], shards) == place) == (features_uri(dpo, shards) == place)
    finally:
        storage.delete(storage.join(shards.uri, "features"))


def test_as_many_actors_as_are_asked_for_or_fit_but_no_more_than_there_is_work():
    assert (actor_pool(4, 2).min_size, actor_pool(4, 2).max_size) == (2, 2)
    assert (actor_pool(1, 9).min_size, actor_pool(1, 9).max_size) == (1, 1)
    assert (actor_pool(None, 9).min_size, actor_pool(None, 9).max_size) == (1, 9)

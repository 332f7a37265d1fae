"""Features that are made once and shared."""

from small_models import make, scans

from mu2llm.evaluation.encode import vision_digest


def test_features_are_shared_by_the_same_vision_alone():
    """The same weights pooled otherwise give other features: they were once read for one another."""
    (one, _), (same, _), (other, _) = make(0), make(0), make(0, vision={"pooling": 1})
    other.model.vision.load_state_dict(one.model.vision.state_dict())
    shapes = [model.encode_vision(scans(1)).shape for model in (one, other)]
    assert shapes[0] != shapes[1]
    assert vision_digest(one) == vision_digest(same) != vision_digest(other)

"""Spaces: YAML, overrides, every kind of domain, and what is refused."""

import pytest

from mu2llm import config
from mu2llm.errors import UserError
from mu2llm.sweeps.space import Domain, Space


def experiment(*overrides):
    return config.load("tiny", list(overrides))


def only(*sets):
    """The tokenizer's space with `top_k` and what else is set."""
    gone = [f"sweep.space.model.tokenizer.{key}=null" for key in ("scales", "queries", "attention", "num_layers")]
    gone.append("sweep.space.model.tokenizer.temperature=null")
    return Space.load("tokenizer", experiment(*gone, *sets))


@pytest.mark.parametrize("kind", ["tokenizer", "dpo"])
def test_every_value_of_the_spaces_that_come_with_the_commands_goes_through_optuna_unchanged(kind):
    space = Space.load(kind, experiment())
    distributions = space.distributions()
    for params in space.grid()[::7]:
        encoded = space.encode(params)
        assert all(distributions[key].to_internal_repr(value) is not None for key, value in encoded.items())
        assert space.decode(encoded) == {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in params.items()}


def test_scales_are_any_subset():
    values = Space.load("tokenizer", experiment()).domains["model.tokenizer.scales"].values()
    assert len(values) == 15
    assert [1] in values and [1, 2, 4, 8] in values


def test_set_replaces_a_domain_and_null_leaves_a_key_out():
    space = only("sweep.space.model.tokenizer.top_k={choice: [4, 8]}")
    assert list(space.domains) == ["model.tokenizer.top_k"]
    assert space.grid() == [{"model.tokenizer.top_k": 4}, {"model.tokenizer.top_k": 8}]


def test_a_grid_of_a_log_range_is_even_in_the_logarithm():
    values = Domain(log=(0.01, 1), points=3).values()
    assert values == [0.01, 0.1, 1.0]
    assert Domain(uniform=(0, 1), points=3).values() == [0.0, 0.5, 1.0]
    assert Domain(integers=(1, 3)).values() == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sweep.space.model.tokenizer.topk={choice: [4]}", "topk.*did you mean top_k"),
        ("sweep.space.model.tokenizer.top_k=[4, 8]", "a domain is such as"),
        ("sweep.space.model.tokenizer.top_k={choice: []}", "top_k"),
        ("sweep.space.model.tokenizer.top_k={choice: [many]}", "'many' will not do"),
        ("sweep.space.model.tokenizer.temperature={log: [0, 1]}", "a log range starts above 0"),
        ("sweep.space.model.tokenizer.temperature={uniform: [2, 1]}", "is empty"),
        ("sweep.space.model.tokenizer.temperature={uniform: [-1, 1]}", "-1.0 will not do"),
        ("sweep.space.model=null", "nothing to search"),
        ("sweep.first=[{model.tokenizer.top_k: 5}]", "5 is not in"),
    ],
)
def test_what_is_not_a_space_is_refused(text, says):
    given = experiment(text)
    with pytest.raises(UserError, match=says):
        Space.load("tokenizer", given).first(given)


def test_a_grid_needs_points_for_real_numbers():
    with pytest.raises(UserError, match=r"temperature: a grid needs `points`"):
        only("sweep.space.model.tokenizer.temperature={log: [0.1, 1]}").grid()


def test_the_configuration_itself_is_tried_first_where_the_space_has_it():
    given = experiment("sweep.space.model.tokenizer.top_k={choice: [4, 8]}", "sweep.space.model.tokenizer.queries=null")
    given = config.validate(given.model_dump(mode="json"))
    space = Space.load("tokenizer", given)
    tokenizer = given.model_dump(mode="json")["model"]["tokenizer"]
    assert space.first(given) == [{key: tokenizer[key.rpartition(".")[2]] for key in space.domains}]
    outside = experiment("sweep.space.model.tokenizer.top_k={choice: [4]}")
    assert Space.load("tokenizer", outside).first(outside) == []


def test_what_is_trained_is_what_is_shown():
    space = Space({"a": Domain(uniform=(0, 1)), "b": Domain(subsets=(1, 2)), "c": Domain(integers=(1, 4))})
    assert space.decode({"a": 0.123456, "b": "[1, 2]", "c": 3}) == {"a": 0.1235, "b": [1, 2], "c": 3}


def test_a_section_that_is_null_is_left_out_and_one_that_only_begins_like_it_is_not():
    assert not any(
        key.startswith("preferences.") for key in Space.load("dpo", experiment("sweep.space.preferences=null")).domains
    )
    assert set(Space.load("dpo", experiment("sweep.space.dpo.be=null")).domains) == set(
        Space.load("dpo", experiment()).domains
    )

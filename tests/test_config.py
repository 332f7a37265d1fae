"""Presets, overrides, and errors that name the key and the mend."""

from importlib import resources

import pytest
import yaml

from mu2llm import artefacts, config
from mu2llm.errors import UserError


def leaves(values, *path):
    """(path, value) of every setting in nested ones."""
    if not isinstance(values, dict):
        return [(path, values)]
    return [leaf for name, value in values.items() for leaf in leaves(value, *path, name)]


@pytest.mark.parametrize("preset", config.presets())
def test_every_setting_of_a_preset_is_taken_over_its_parents_and_survives_json(preset):
    written = yaml.safe_load((resources.files("mu2llm") / "presets" / f"{preset}.yaml").read_text())
    parent = written.pop("extends", None)
    experiment = config.load(preset)
    loaded = dict(leaves(experiment.model_dump(mode="json")))
    assert experiment.name == preset
    assert {path: loaded[path] for path, _ in leaves(written)} == dict(leaves(written))
    if parent:
        inherited = leaves(config.load(parent).model_dump(mode="json"))
        changed = {path for path, value in inherited if loaded.get(path) != value} - {("name",)}
        assert changed <= {path[:n] for path, _ in leaves(written) for n in range(1, len(path) + 1)}
    assert config.validate(experiment.model_dump(mode="json")) == experiment


def test_a_preset_extends_another_and_is_overridden():
    experiment = config.load("tiny", ["dpo.beta=0.2", "data.phantom.cases=7"])
    assert (experiment.dpo.beta, experiment.data.phantom.cases) == (0.2, 7)
    assert experiment.data.spec == config.load("demo").data.spec


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("dpo.bta=1", "did you mean beta"),
        ("dpo.beta=0", "dpo.beta"),
        ("dpo.beta", "KEY=VALUE"),
        ("nothing.at.all=1", "nothing is not a key"),
        ("model.vision.patch_size=[3,8,8]", "does not divide the chunk"),
    ],
)
def test_wrong_overrides_are_one_line_that_names_the_key(override, says):
    with pytest.raises(UserError, match=says) as error:
        config.load("demo", [override])
    assert "\n" not in str(error.value)


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(UserError, match="demo"):
        config.load("nothing")


def test_a_digest_changes_with_any_value():
    assert artefacts.digest({"a": 1}) == artefacts.digest({"a": 1}) != artefacts.digest({"a": 2})


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_keys_are_turned_on_and_off_by_those_words(word):
    """YAML reads the first two as true and false, which were refused."""
    assert config.load("tiny", [f"serving.authentication={word}"]).serving.authentication == word

"""Identities: what decides a result, and what does not; checkpoints are known by their weights."""

import json
from pathlib import Path

import pytest
import saved
from pydantic import Field

from mu2llm import artefacts, config
from mu2llm.artefacts import VERSION, Identity, claim, decides, open_checkpoint, publish, weights_of
from mu2llm.errors import Failure, UserError
from mu2llm.records import Checkpoint, Lineage
from mu2llm.settings.section import EXECUTION, Execution, Section

DEFAULTS = Path(__file__).with_name("deciding_settings.json")
SECTIONS = ("data", "model", "contrastive", "sft", "preferences", "dpo", "judge", "evaluation")


class Inner(Section):
    size: int = 4


class Settings(Section):
    rate: float = 0.1
    pages: Execution[int] = Field(3, ge=0)
    inner: Inner = Inner()
    extra: Inner | None = None


class Newer(Settings):
    """The same settings in a later version."""

    added: str = "as before"


def test_a_setting_decides_where_it_differs_from_its_default_and_is_not_of_the_execution():
    assert decides("s", Settings()) == decides("s", Newer()) == decides("s", Settings(pages=9)) == {}
    assert decides("s", Settings(rate=0.2, inner=Inner(size=5))) == {"s.rate": 0.2, "s.inner.size": 5}
    assert decides("s", Settings(extra=Inner())) == {"s.extra": True}
    assert decides("s", Newer(added="otherwise", rate=0.2), leave_out=("rate",)) == {"s.added": "otherwise"}


def deciding(name, section):
    """Dotted key → default of every setting that decides something."""
    found = {}
    for field, info in type(section).model_fields.items():
        value, key = getattr(section, field), f"{name}.{field}"
        if EXECUTION in info.metadata:
            continue
        if isinstance(value, Section):
            found |= deciding(key, value)
        elif not info.is_required():
            default = info.get_default(call_default_factory=True)
            found[key] = default.model_dump(mode="json") if isinstance(default, Section) else default
    return json.loads(json.dumps(found))


def test_no_default_has_changed_without_a_new_version_of_identities():
    """Only what differs from a default is part of an identity: another default would take old results for its own.

    Fails too for a new setting: say whether it is `Execution`; if it is not, add it to the file with its default.
    """
    experiment = config.load("tiny")
    now = {key: v for name in SECTIONS for key, v in deciding(name, getattr(experiment, name)).items()}
    assert {"version": VERSION, "defaults": now} == json.loads(DEFAULTS.read_text())


def test_a_difference_is_named_with_both_mends():
    here = Identity.of({"sft.learning_rate": 0.001, "data": "abc"})
    here.check("out", "a result", here.digest, here.inputs)
    for inputs, says in (
        ({"sft.learning_rate": 0.002, "data": "abc"}, r"sft\.learning_rate is 0\.002 there, 0\.001 here"),
        ({"data": "abc"}, r"sft\.learning_rate is the default there, 0\.001 here"),
        ({"sft.learning_rate": 0.001, "data": "x" * 64}, r"data is xxxxxxxxxxxx… there, abc here"),
        ({"sft.learning_rate": 0.001, "data": "abc", "sft.epochs": 2}, r"sft\.epochs is 2 there, the default here"),
    ):
        there = Identity.of(inputs)
        with pytest.raises(
            UserError, match=f"out holds a result of another configuration or data: {says}; --fresh .*--out"
        ):
            here.check("out", "a result", there.digest, there.inputs)
    with pytest.raises(UserError, match="of an earlier version"):
        here.check("out", "a result", "0123456789ab", {})


def test_a_place_is_claimed_once(tmp_path):
    place, mine, other = str(tmp_path / "out.state"), Identity.of({"seed": 1}), Identity.of({"seed": 2})
    claim(place, mine, "a result")
    (tmp_path / "out.state" / "half").write_text("a day of work")
    claim(place, mine, "a result")
    with pytest.raises(UserError, match="seed is 1 there, 2 here"):
        claim(place, other, "a result")
    (tmp_path / "out.state" / artefacts.CLAIM).unlink()
    with pytest.raises(UserError, match="without a record"):
        claim(place, mine, "a result")
    assert (tmp_path / "out.state" / "half").read_text() == "a day of work"


def test_a_checkpoint_is_whole_once_it_describes_itself(tmp_path):
    saved.weights(tmp_path / "local")
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="not a checkpoint"):
        open_checkpoint(out)
    checkpoint = Checkpoint(uri=out, experiment={"seed": 1}, lineage=Lineage(stage="sft", spec_hash="abc"))
    made = publish(checkpoint, str(tmp_path / "local"))
    assert open_checkpoint(out) == made and made.lineage.weights
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "local" / "model.safetensors"
    ).read_bytes()


def test_weights_are_known_by_their_content(tmp_path):
    def digests(name, **given):
        saved.weights(tmp_path / name, **given)
        return artefacts.folder_weights(str(tmp_path / name))

    one = digests("one")
    assert digests("same") == one
    head, tower = digests("head", value=1.0), digests("tower", vision=1.0)
    assert head.weights != one.weights and head.vision == one.vision
    assert tower.weights != one.weights and tower.vision != one.vision
    configured = digests("configured", config='{"vision_config": {"pooling": 1}}')
    assert configured.weights != one.weights and configured.vision != one.vision
    assert artefacts.folder_weights(str(tmp_path)) == ("", "")  # no weights at all


def test_weights_in_several_files_are_read_whole(tmp_path):
    for n, value in enumerate((0.0, 1.0)):
        saved.weights(tmp_path / "parts", value, name=f"model-{n}.safetensors")
    before = artefacts.folder_weights(str(tmp_path / "parts"))
    saved.weights(tmp_path / "parts", 2.0, name="model-1.safetensors")
    assert artefacts.folder_weights(str(tmp_path / "parts")).weights != before.weights


def test_an_older_checkpoint_without_a_digest_is_read_once(tmp_path, monkeypatch):
    made = saved.checkpoint(tmp_path / "sft", value=3.0)
    older = made.model_copy(update={"lineage": made.lineage.model_copy(update={"weights": "", "vision": ""})})
    artefacts.describe(older)
    assert weights_of(open_checkpoint(made.uri)) == weights_of(made)
    monkeypatch.setattr(artefacts, "_read_file", lambda uri: pytest.fail("read again"))
    assert weights_of(open_checkpoint(made.uri)) == weights_of(made)


@pytest.mark.parametrize("broken", [b"", b"weights", (9).to_bytes(8, "little") + b"{not json", None])
def test_a_broken_file_is_a_failure_and_no_digest(tmp_path, broken):
    saved.weights(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] if broken is None else broken)
    with pytest.raises(Failure, match=r"model\.safetensors .*safetensors file"):
        artefacts.folder_weights(str(tmp_path / "a"))

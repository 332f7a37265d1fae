"""Only what was evaluated and looks at the scan becomes champion; what was replaced can come back."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from small_runs import write_checkpoint
from typer.testing import CliRunner

from mu2llm import storage, tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.cli import app
from mu2llm.errors import UserError
from mu2llm.evaluation import leaderboard
from mu2llm.evaluation.leaderboard import Row
from mu2llm.evaluation.promotion import CARD, go_back, promote
from mu2llm.records import Checkpoint, Estimate

GREEN = Estimate(value=0.5, low=0.4, high=0.6, n=10)


def evaluated(checkpoint, red_line="", split="test"):
    row = Row(
        run="sft",
        data="phantoms",
        split=split,
        judge="rules",
        cases=10,
        metrics={"green": GREEN},
        red_line=red_line,
        checkpoint=checkpoint,
        identity=open_checkpoint(checkpoint).lineage.weights,
    )
    leaderboard.track(row)


@pytest.fixture
def sft(tmp_path):
    return write_checkpoint(str(tmp_path / "sft"), 0)


def test_a_champion_is_replaced_and_comes_back(sft, checkpoints):
    for uri in (sft, checkpoints["dpo"]):
        evaluated(uri)
    first, second = promote(sft), promote(checkpoints["dpo"])
    assert (first.replaced, second.replaced) == (None, first.version)
    assert tracking.registered() == checkpoints["dpo"]
    assert go_back().version == first.version
    assert tracking.registered() == sft
    with pytest.raises(UserError, match="nothing to go back to"):
        go_back()


def test_who_gave_and_took_back_an_alias_is_on_record(sft, checkpoints):
    for uri in (sft, checkpoints["dpo"]):
        evaluated(uri)
        promote(uri)
    go_back()
    records = tracking.runs("promote")
    told = [(run.parameters["version"], run.parameters["replaced"], run.parameters["back"]) for run in records]
    assert told == [("1", "2", "True"), ("2", "1", "False"), ("1", "None", "False")]
    assert all(run.tags["by"] and run.parameters["alias"] == "champion" for run in records)


def test_a_challenger_becomes_champion_by_its_registry_name(sft, monkeypatch):
    evaluated(sft)
    monkeypatch.chdir(Path(sft).parent)
    challenger = promote(Path(sft).name, "challenger")  # a relative path is the same checkpoint
    assert challenger.checkpoint == sft
    champion = promote("registry://mu2llm@challenger")
    assert champion.checkpoint == tracking.locate("registry://mu2llm@champion") == sft


def test_an_evaluation_on_train_or_of_earlier_weights_is_none(sft):
    evaluated(sft, split="train")
    with pytest.raises(UserError, match="train alone"):
        promote(sft)
    evaluated(sft)
    made = open_checkpoint(sft)
    newer = made.model_copy(update={"lineage": made.lineage.model_copy(update={"weights": "trained anew"})})
    storage.write_json(storage.join(sft, Checkpoint.FILE), newer.model_dump(mode="json"))
    with pytest.raises(UserError, match="no evaluation"):
        promote(sft)


def test_the_card_tells_data_metrics_audit_and_limits(sft):
    evaluated(sft)
    promote(sft)
    text = storage.read_bytes(storage.join(sft, CARD)).decode()
    about = ModelCard(text).data
    assert about.license == "mit"
    [result] = about.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("green", 0.5, "test")
    for part in ("0.500 (0.40–0.60)", "phantoms", "judge rules", "Audit passed", "Not a medical device", "| 10 |"):
        assert part in text


def test_what_was_never_evaluated_is_refused(sft):
    with pytest.raises(UserError, match="no evaluation"):
        promote(sft)
    assert tracking.version_of("champion") is None
    assert not storage.exists(storage.join(sft, CARD))


def test_a_red_line_is_refused_unless_forced(sft):
    evaluated(sft, "does not look at the scan")
    with pytest.raises(UserError, match="does not look at the scan"):
        promote(sft)
    forced = promote(sft, force=True)
    assert forced.forced and "does not look" in tracking.version_tags(forced.version)["forced"]
    assert "**Audit: does not look at the scan**" in storage.read_bytes(storage.join(sft, CARD)).decode()


def test_a_score_not_above_its_floor_is_refused(sft):
    evaluated(sft, "below its floor: GREEN 0.500 (constant 0.600)")
    with pytest.raises(UserError, match=r"on phantoms, test: below its floor: GREEN 0\.500 \(constant 0\.600\)"):
        promote(sft)


def test_what_writes_no_reports_or_has_another_spec_is_refused(sft, tmp_path):
    evaluated(sft)
    checkpoint = open_checkpoint(sft)
    lineage = checkpoint.lineage
    for changed, told in (({"stage": "contrastive"}, "writes no reports"), ({"spec_hash": "other"}, "trained on spec")):
        other = checkpoint.model_copy(update={"lineage": lineage.model_copy(update=changed)})
        storage.write_json(storage.join(sft, Checkpoint.FILE), other.model_dump(mode="json"))
        with pytest.raises(UserError, match=told):
            promote(sft, force=True)


def test_the_commands(sft, tmp_path):
    evaluated(sft)
    runner = CliRunner()
    assert '"version": "1"' in runner.invoke(app, ["promote", sft, "--json"]).stdout
    page = tmp_path / "board.html"
    done = runner.invoke(app, ["leaderboard", "--html", str(page), "--json"])
    assert '"phantoms"' in done.stdout and "arXiv 2507.00316" in done.stdout
    assert "not comparable" in page.read_text(encoding="utf-8")
    assert isinstance(runner.invoke(app, ["promote"]).exception, UserError)

"""Runs in the store: parameters, numbers by step, lineage, children; what waits; registry names; the commands."""

import json
import shutil
import tempfile

import pytest
from typer.testing import CliRunner

from mu2llm import storage, tracking
from mu2llm.cli import app
from mu2llm.errors import UserError
from mu2llm.records import Checkpoint, Lineage
from mu2llm.tracking import sender
from mu2llm.tracking.spool import Spool

LINEAGE = {"data": "s3://b/shards", "data_checksum": "abc", "spec": "123", "judge": "rules", "commit": "c0ffee"}


@pytest.fixture(autouse=True)
def store(empty_store, tmp_path, monkeypatch):
    shutil.copy(empty_store, tmp_path / "runs.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    return tracking.store()


def tracked(stage="sft", steps=3, **more):
    run = tracking.start_stage(stage, {"model": {"k": 4}, "seed": 0}, LINEAGE, **more)
    for step in range(steps):
        run.log({"loss": 1 / (step + 1), "rewards/chosen": float(step)}, step)
    return run


def test_a_run_has_configuration_numbers_by_step_lineage_and_links():
    tracking.end_stage(tracked(), {"checkpoint": "/c/sft"})
    [run] = tracking.runs()
    assert (run.stage, run.status, run.checkpoint) == ("sft", "FINISHED", "/c/sft")
    assert run.parameters == {"model.k": "4", "seed": "0"}
    assert run.tags.items() >= LINEAGE.items()
    assert tracking.history(run, "loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    [data] = sender.client(tracking.store()).get_run(run.id).inputs.dataset_inputs
    assert (data.dataset.digest, json.loads(data.dataset.source)) == ("abc", {"uri": "s3://b/shards"})


def test_trials_are_children_of_their_sweep():
    sweep = tracking.start_stage("sweep", {}, {})
    with tracking.under(sweep):
        tracking.end_stage(tracked("sft"), {})
    tracking.end_stage(tracked("dpo", parent=sweep), {})
    tracking.end_stage(tracked("contrastive"), {})
    tracking.end_stage(sweep, {})
    by_stage = {run.stage: run for run in tracking.runs()}
    assert by_stage["sft"].parent == by_stage["dpo"].parent == by_stage["sweep"].id
    assert by_stage["contrastive"].parent is None


def test_an_interrupted_run_goes_on_as_itself():
    first = tracked()
    tracking.end_stage(first, {}, "KILLED")
    again = tracking.start_stage("sft", {"workers": 9}, LINEAGE, key=first.key)
    again.log({"loss": 0.1}, 3)
    tracking.end_stage(again, {})
    [run] = tracking.runs()
    assert run.status == "FINISHED" and run.parameters["model.k"] == "4"
    assert len(tracking.history(run, "loss")) == 4


def test_what_was_sent_but_not_marked_is_there_once(monkeypatch):
    monkeypatch.setattr(sender, "open_run", lambda *_: None)  # nothing is sent but by `deliver`
    monkeypatch.setattr(sender, "close_run", lambda *_: None)
    mark, calls = Spool.mark, []

    def dying(self, *arguments):
        """The process dies after each kind of entry, once, before it can write down that it was sent."""
        calls.append(arguments)
        if len(calls) % 2:
            raise KeyboardInterrupt
        mark(self, *arguments)

    run = tracked(steps=5)
    tracking.end_stage(run, {"checkpoint": "/c/sft"})
    monkeypatch.setattr(Spool, "mark", dying)
    for _ in range(10):
        try:
            made = tracking.deliver(tracking.store())
            break
        except KeyboardInterrupt:
            pass
    assert len(calls) == 8 and made.waiting == 0
    [found] = tracking.runs()
    assert found.status == "FINISHED" and len(tracking.history(found, "loss")) == 5


def test_a_line_that_a_kill_cut_short_is_left_out_and_the_rest_is_kept():
    run = tracked(steps=1)
    with open(f"{run.spool}/{run.key}.jsonl", "ab") as stream:
        stream.write(b'{"kind": "metrics", "items": [["lo')
    run.log({"loss": 0.25}, 7)
    tracking.end_stage(run, {})
    [found] = tracking.runs()
    assert tracking.history(found, "loss")[-1] == (7, 0.25)
    assert tracking.waiting() == 0


def test_what_the_store_refuses_is_kept_aside_and_does_not_hold_up_the_rest(caplog):
    run = tracked(steps=2)
    run.log({"no:such\nname*": 1.0}, 2)
    run.log({"loss": 0.5}, 3)
    tracking.end_stage(run, {})
    [found] = tracking.runs()
    assert len(tracking.history(found, "loss")) == 3 and found.status == "FINISHED"
    [refused] = tracking.refused()
    assert "name" in refused["why"] and refused["items"][0][0] == "no:such\nname*"
    assert "refuses" in caplog.text


def test_a_disk_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    tracking.StageRun(spool=str(tmp_path / "gone"), key="x").log({"loss": 1.0}, 0)
    assert "not recorded" in caplog.text


def test_without_a_home_that_can_be_written_it_waits_among_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "no_folder").touch()
    monkeypatch.setenv("MU2LLM_SPOOL", str(tmp_path / "no_folder" / "spool"))
    run = tracked(steps=1)
    assert run.spool.startswith(str(tmp_path))
    tracking.end_stage(run, {})
    assert [each.status for each in tracking.runs()] == ["FINISHED"]


def test_passwords_of_a_store_are_neither_shown_nor_kept():
    uri = "http://user:secret@host:5000/path"
    assert tracking.shown(uri) == "http://host:5000/path"
    assert "secret" not in (Spool.of(uri).path / "store.txt").read_text()


def checkpoint(uri, stage, parent=None, run=""):
    lineage = Lineage(stage=stage, spec_hash="123", parent=parent, data="s3://b/shards", run=run)
    made = Checkpoint(uri=str(uri), experiment={}, lineage=lineage)
    storage.write_json(storage.join(str(uri), Checkpoint.FILE), made.model_dump(mode="json"))
    return made


def test_lineage_goes_back_to_the_first_stage_also_without_the_store(tmp_path):
    vision, sft = (str(tmp_path / name) for name in ("vision", "sft"))
    checkpoint(vision, "contrastive", parent="/nowhere")
    checkpoint(sft, "sft", parent=vision)
    run = tracking.start_stage("dpo", {}, {**LINEAGE, "parent": sft})
    tracking.end_stage(run, {"checkpoint": "/c/dpo"})
    chain = tracking.lineage("/c/dpo")
    assert [step.stage for step in chain[:3]] == ["dpo", "sft", "contrastive"]
    assert chain[0].run and chain[0].judge == "rules"
    assert chain[1].run is None and chain[1].data == "s3://b/shards"  # told by the checkpoint itself
    assert chain[3].stage.startswith("unknown") and chain[3].checkpoint == "/nowhere"


def test_registry_names_are_resolved_where_a_checkpoint_is_named(tmp_path):
    made = checkpoint(tmp_path / "sft", "sft")
    with pytest.raises(UserError, match="no mu2llm@champion"):
        tracking.locate("registry://mu2llm@champion")
    run = tracked(steps=0)
    tracking.end_stage(run, {})
    tracking.register(made, tracking.id_of(run.key), "champion")
    assert tracking.id_of("none") is None
    assert tracking.locate("registry://mu2llm@champion") == tracking.locate("registry://mu2llm/1") == made.uri
    assert tracking.locate("s3://b/c") == "s3://b/c"
    for wrong in ("registry://mu2llm", "registry://other@champion", "registry://mu2llm/7"):
        with pytest.raises(UserError, match=r"registry://mu2llm|no version 7"):
            tracking.locate(wrong)
    result = CliRunner().invoke(app, ["generate", "--checkpoint", "registry://mu2llm@challenger", "x.nii"])
    assert "mu2llm@challenger" in str(result.exception)


def test_the_commands():
    tracking.end_stage(tracked(), {"checkpoint": "/c/sft"})
    run = tracking.start_stage("dpo", {"model": {"k": 8}, "seed": 0}, {**LINEAGE, "parent": "/c/sft"})
    run.log({"loss": float("nan")}, 0)
    tracking.end_stage(run, {"checkpoint": "/c/dpo"}, "FAILED")
    runner = CliRunner()

    def command(*arguments):
        done = runner.invoke(app, ["runs", *arguments, "--json"], catch_exceptions=False)
        return json.loads(done.stdout, parse_constant=pytest.fail)

    dpo, sft = command("list")
    assert (dpo["stage"], dpo["status"], dpo["metrics"]["loss"]) == ("dpo", "FAILED", None)
    assert [each["id"] for each in command("list", "--stage", "sft")] == [sft["id"]]
    assert command("show", sft["id"][:12])["parameters"]["model.k"] == "4"
    assert command("show", "/c/sft", "--metric", "loss")[1] == {"step": 1, "value": 0.5}
    compared = command("compare", "/c/sft", "/c/dpo")
    assert compared["differences"]["model.k"] == ["4", "8"] and "seed" not in compared["differences"]
    assert [step["stage"] for step in command("lineage", "/c/dpo")] == ["dpo", "sft"]
    assert command("sync")["waiting"] == 0
    for arguments in (["list"], ["show", "/c/sft"], ["compare", "/c/sft", "/c/dpo"], ["lineage", "/c/dpo"]):
        assert runner.invoke(app, ["runs", *arguments], catch_exceptions=False).stdout
    for wrong in (["show", "zz"], ["show", "/c/sft", "--metric", "nope"], ["compare", "/c/sft"]):
        assert isinstance(runner.invoke(app, ["runs", *wrong]).exception, UserError)

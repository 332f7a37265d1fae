"""What challenges take is what `score` reads back; nothing is overwritten unasked."""

import json

import pytest
from small_runs import case

from mu2llm import storage
from mu2llm.cli import app
from mu2llm.engine.predictions import Prediction
from mu2llm.errors import UserError
from mu2llm.evaluation import foreign
from mu2llm.evaluation.exports.reports import radmatch, vlm3d
from mu2llm.evaluation.results import Header

CASES = [case(i) for i in range(4)]
REPORTS = {each.id: f"Findings: {each.report}\n\nImpression: “none”." for each in CASES}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def predictions(tmp_path):
    return lines(tmp_path / "p.jsonl", [{"id": name, "prediction": text} for name, text in REPORTS.items()])


def evaluated(folder):
    """What `evaluate` leaves there, of two runs."""
    same = {"question": "", "index": 0, "tokens": 1, "finished": True, "scan_of": "", "seed": 0}
    written = [
        Prediction(run=run, case_id=name, variant=variant, region=region, text=f"{run} {variant} {region}", **same)
        for run in ("sft", "dpo", "prior")
        for name in REPORTS
        for variant, region in (("as_is", None), ("as_is", "chest"), ("zeroed", None))
    ]
    storage.write_table(f"{folder}/predictions.parquet", Prediction.table(written))
    Header(identity="", checkpoints={"sft": "a", "dpo": "b"}, data="", split="", question="", seed=0, prior="",
           histories={}).write(str(folder))  # fmt: skip
    return str(folder)


def test_results_json_has_the_challenges_shape_and_comes_back(predictions, tmp_path):
    out = str(tmp_path / "results.json")
    told = vlm3d(predictions, out)
    assert told == {"out": out, "reports": 4, "empty": []}
    written = json.loads((tmp_path / "results.json").read_text())
    assert set(written) == {"name", "type", "generated_reports", "version"}
    assert (written["name"], written["type"]) == ("Generated reports", "Report generation")
    assert written["version"] == {"major": 1, "minor": 0}
    assert all(set(each) == {"input_image_name", "report"} for each in written["generated_reports"])
    again = foreign.read(out, "--predictions").reports
    assert again == foreign.read(predictions, "--predictions").reports and set(again) == set(REPORTS)
    with pytest.raises(UserError, match=r"there already.*--fresh"):
        vlm3d(predictions, out)
    assert vlm3d(out, str(tmp_path / "again.json")) == {**told, "out": str(tmp_path / "again.json")}
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "results.json").read_bytes()
    assert vlm3d(predictions, out, fresh=True)["reports"] == 4


def test_what_generate_and_evaluate_wrote(tmp_path):
    generated = [{"path": "scans/a.nii.gz", "report": "x"}, {"path": "b.mha", "rejected": "not_hu", "message": "m"}]
    (tmp_path / "generated.json").write_text(json.dumps(generated))
    told = vlm3d(str(tmp_path / "generated.json"), str(tmp_path / "results.json"))
    assert told["empty"] == ["b"]
    written = json.loads((tmp_path / "results.json").read_text())["generated_reports"]
    assert written == [{"input_image_name": "a", "report": "x"}, {"input_image_name": "b", "report": ""}]
    folder = evaluated(tmp_path / "evaluated")
    for run, expected in ((None, "dpo as_is None"), ("sft", "sft as_is None")):
        vlm3d(folder, str(tmp_path / "of.json"), run, fresh=True)
        assert foreign.read(str(tmp_path / "of.json"), "--predictions").reports == dict.fromkeys(REPORTS, expected)
    with pytest.raises(UserError, match=r"--run other.*sft, dpo"):
        vlm3d(folder, str(tmp_path / "x.json"), "other")


def test_one_report_an_image(tmp_path):
    twice = lines(tmp_path / "twice.jsonl", [{"id": "a.nii.gz", "report": "x"}, {"id": "a", "report": "y"}])
    with pytest.raises(UserError, match="come twice: a"):
        vlm3d(twice, str(tmp_path / "r.json"))
    with pytest.raises(UserError, match="1 reports without an id"):
        vlm3d(lines(tmp_path / "p.jsonl", [{"id": "a", "report": "x"}, {"report": "y"}]), str(tmp_path / "r.json"))
    assert not (tmp_path / "r.json").exists()


def test_radmatch_pairs_by_name(predictions, tmp_path):
    rows = [{"id": each.id, "report": each.report} for each in CASES[:3]] + [{"id": "z", "report": "r"}]
    told = radmatch(predictions, lines(tmp_path / "r.jsonl", rows), str(tmp_path / "out"))
    assert told["reports"] == 3
    assert told["unmatched"] == {"missing": ["z"], "left_over": [CASES[3].id]}
    names = {f"{each.id}.txt" for each in CASES[:3]}
    for folder in ("reports_gt", "reports_pred"):
        assert {path.name for path in (tmp_path / "out" / folder).iterdir()} == names
    assert foreign.read(str(tmp_path / "out" / "reports_gt"), "--references").reports == {
        each.id: each.report for each in CASES[:3]
    }
    written = foreign.read(str(tmp_path / "out" / "reports_pred"), "--predictions").reports
    assert written == {each.id: foreign.read(predictions, "--predictions").reports[each.id] for each in CASES[:3]}
    with pytest.raises(UserError, match="there already"):
        radmatch(predictions, str(tmp_path / "r.jsonl"), str(tmp_path / "out"))
    radmatch(predictions, lines(tmp_path / "r.jsonl", rows[:1]), str(tmp_path / "out"), fresh=True)
    assert len(list((tmp_path / "out" / "reports_gt").iterdir())) == 1


def test_a_folder_that_no_export_made_is_left_alone(predictions, tmp_path):
    (tmp_path / "mine").mkdir()
    rows = [{"id": each.id, "report": each.report} for each in CASES]
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="no export made it"):
        radmatch(predictions, lines(tmp_path / "r.jsonl", rows), str(tmp_path / "mine"), fresh=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_ids_that_are_no_file_names(tmp_path):
    both = lines(tmp_path / "b.jsonl", [{"id": "../a", "report": "x"}])
    with pytest.raises(UserError, match="no file name"):
        radmatch(both, both, str(tmp_path / "out"))


def test_the_command(predictions, tmp_path):
    from typer.testing import CliRunner

    out = str(tmp_path / "results.json")
    done = CliRunner().invoke(app, ["export", "vlm3d", "--predictions", predictions, "--out", out, "--json"])
    assert json.loads(done.stdout) == {"out": out, "reports": 4, "empty": []}

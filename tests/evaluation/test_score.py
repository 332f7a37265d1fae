"""Other people's reports: whatever they lie in, joined by id, scored without a model; known by where they came from."""

import csv
import json

import pytest
from small_runs import case
from typer.testing import CliRunner

from mu2llm import tracking
from mu2llm.cli import app
from mu2llm.config import load
from mu2llm.errors import UserError
from mu2llm.evaluation import foreign, leaderboard, leaderboard_page
from mu2llm.evaluation.evaluate import compare_saved
from mu2llm.evaluation.score import score, summary
from mu2llm.records import Judgement

CASES = [case(i) for i in range(12)]
REPORTS = {each.id: each.report for each in CASES}
SETTINGS = load("tiny", ["evaluation.text_encoder=none", "evaluation.bootstrap=100"])


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def references(tmp_path):
    rows = [{"id": each.id, "report": each.report, "patient": each.patient} for each in CASES]
    return lines(tmp_path / "references.jsonl", rows)


def as_csv(folder):
    with (folder / "p.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["VolumeName", "Findings_EN", "Impressions_EN"])
        writer.writeheader()
        writer.writerows(
            {"VolumeName": f"{name}.nii.gz", "Findings_EN": text.removeprefix("Findings: ")}
            for name, text in REPORTS.items()
        )
    return folder / "p.csv"


def as_folder(folder):
    (folder / "p").mkdir()
    for name, text in REPORTS.items():
        (folder / "p" / f"{name}.txt").write_text(text)
    return folder / "p"


def as_vlm3d(folder):
    reports = [{"input_image_name": f"{name}.mha", "report": text} for name, text in REPORTS.items()]
    (folder / "results.json").write_text(json.dumps({"name": "Generated reports", "generated_reports": reports}))
    return folder / "results.json"


def as_object(folder):
    (folder / "p.json").write_text(json.dumps(REPORTS))
    return folder / "p.json"


def as_lines(folder):
    return lines(folder / "p.jsonl", [{"case_id": name, "prediction": text} for name, text in REPORTS.items()])


@pytest.mark.parametrize("made", [as_csv, as_folder, as_vlm3d, as_object, as_lines])
def test_every_form_is_read(made, tmp_path):
    assert foreign.read(str(made(tmp_path)), "--predictions").reports == REPORTS


def test_one_file_may_hold_both(tmp_path):
    path = lines(tmp_path / "both.jsonl", [{"id": "a", "reference": "Truth.", "candidate": "Guess."}])
    assert foreign.read(path, "--predictions").reports == {"a": "Guess."}
    assert foreign.references(path, None)[0][0].report == "Truth."


def test_labels_and_patients_come_along(tmp_path):
    labels = dict.fromkeys(foreign.LABELS, 0) | {"Emphysema": 1}
    rows = [{"id": "train_7_b", "report": "x", "labels": labels}, {"id": "b", "report": "x", "labels": {"other": 1}}]
    first, second = foreign.references(lines(tmp_path / "r.jsonl", rows), None)[0]
    assert first.labels == labels and first.patient == "train_7"
    assert second.labels is None and second.patient == "b"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("none.csv", None, "there is nothing"),
        ("p.docx", "x", r"expected \.csv"),
        ("p.csv", "report\nx\n", "no column for an id"),
        ("p.csv", "id,words\na,x\n", "no column for a text"),
        ("p.json", "[1]", "expected VLM3D"),
    ],
)
def test_what_cannot_be_read_says_why(name, content, why, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=why):
        foreign.read(str(tmp_path / name), "--predictions")


def test_right_reports_reach_the_ceiling(references, tmp_path):
    out = str(tmp_path / "out")
    results = score(as_lines(tmp_path), references, out, SETTINGS)
    found = summary(results)
    assert (found["n"], found["unmatched"]) == (12, {"missing": [], "doubled": [], "left_over": []})
    assert {found["metrics"][name]["value"] for name in ("green", "finding_f1", "rouge_l", "bleu_4")} == {1}
    assert found["metrics"]["green"]["n"] == 12 and found["below_floor"] == [] and found["red_line"] == ""
    assert set(found["floors"]) == {
        *("constant", "other_patient", "all_positive", "all_negative", "nearest", "reference")
    }
    assert "foreign reports" in (tmp_path / "out" / "report.html").read_text()
    [row] = leaderboard.tracked(tracking.tags("evaluate"))
    assert row.foreign.endswith("p.jsonl") and row.checkpoint is None and row.label == "p (foreign)"
    assert row.split_hash == found["split_hash"] and row.floors
    again = score(as_lines(tmp_path), references, out, SETTINGS)
    assert again == results
    with pytest.raises(UserError, match="--fresh"):
        score(lines(tmp_path / "q.jsonl", [{"id": "case-00", "report": "x"}]), references, out, SETTINGS)


def test_the_constant_is_said_to_be_the_floor(references, tmp_path):
    from mu2llm.evaluation.floors import written

    fixed = written(CASES, [])["prior"][0]
    rows = [{"id": name, "report": fixed} for name in REPORTS]
    places = ["--predictions", lines(tmp_path / "c.jsonl", rows), "--references", references]
    done = CliRunner().invoke(
        app,
        ["score", *places, "--out", str(tmp_path / "out"), "--preset", "tiny"],
        catch_exceptions=False,
        env={"COLUMNS": "300"},
    )
    assert "this is the floor: no metric is above what needs no model" in " ".join(done.stdout.split())
    assert "one typical training report" in done.stdout


def test_what_does_not_meet_is_counted_and_named(references, tmp_path):
    rows = [{"id": name.upper(), "report": text} for name, text in list(REPORTS.items())[:9]]
    rows += [rows[0], {"id": "case-99", "report": "x"}, {"report": "nameless"}]
    results = score(lines(tmp_path / "p.jsonl", rows), references, str(tmp_path / "out"), SETTINGS)
    found = summary(results)
    assert found["n"] == 9 and found["split_hash"] != ""
    assert found["unmatched"] == {
        **{"missing": ["case-09", "case-10", "case-11"], "doubled": ["CASE-00"], "left_over": ["case-99"]},
        "without_id": [""],
    }
    assert found["red_line"] == "scored on 9 of 12 cases only: the others have no prediction"
    assert "3 references without a prediction: case-09, case-10, case-11" in found["warnings"]
    with pytest.raises(UserError, match="no id is among the references"):
        score(lines(tmp_path / "q.jsonl", [{"id": "z", "report": "x"}]), references, str(tmp_path / "o"), SETTINGS)


def test_empty_and_cut_off_reports_score_0(references, tmp_path):
    rows = [{"id": name, "report": text, "finished": True} for name, text in REPORTS.items()]
    rows[0]["report"], rows[1]["finished"] = "", False
    found = summary(score(lines(tmp_path / "p.jsonl", rows), references, str(tmp_path / "out"), SETTINGS))
    assert found["metrics"]["green"]["value"] == pytest.approx(10 / 12) and found["metrics"]["green"]["n"] == 12
    assert sum(found["failed"].values()) == 2 and found["invalid"] == {}


def test_scores_of_other_cases_are_not_compared_unless_told(references, tmp_path):
    whole, part = (
        score(lines(tmp_path / f"{n}.jsonl", [{"id": i, "report": t} for i, t in list(REPORTS.items())[:n]]),
              references, str(tmp_path / str(n)), SETTINGS)
        for n in (12, 6)
    )  # fmt: skip
    assert whole.split_hash != part.split_hash
    with pytest.raises(UserError, match=f"{part.split_hash}.*different cases.*--common"):
        compare_saved([str(tmp_path / "12"), str(tmp_path / "6")], str(tmp_path / "both"), SETTINGS)
    both = compare_saved([str(tmp_path / "12"), str(tmp_path / "6")], str(tmp_path / "both"), SETTINGS, common=True)
    assert both.cases == 6 and both.split_hash == part.split_hash
    assert both.difference("6", "12")["green"]["value"] == 0


class Half:
    """A judge that measures something else than GREEN."""

    measures, identity = "half", "half@1"

    def __init__(self, config):
        pass

    def judge(self, pairs):
        return [Judgement(valid=True, score=0.5, judge=self.identity) for _ in pairs]


def test_what_a_judge_measures_stands_beside_green_under_its_own_name(references, tmp_path):
    judge = SETTINGS.judge.model_copy(update={"name": "python:test_score:Half"})
    settings = SETTINGS.model_copy(update={"judge": judge})
    results = score(as_lines(tmp_path), references, str(tmp_path / "out"), settings)
    found = summary(results)
    assert (found["metrics"]["half"]["value"], found["metrics"]["green"]["value"]) == (0.5, 1)
    assert (found["judge"], results.measures) == ("half@1", "half") and "rules@" in found["notes"]["green"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "half 0.50" in page and "GREEN 0.50" not in page
    [row] = leaderboard.rows(results)
    assert "| half |" in leaderboard.markdown([row]) and "half" in leaderboard_page.html([row])

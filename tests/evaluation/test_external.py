"""Metrics of other programs: the same table, floors and intervals; whatever fails is named."""

import json
import shlex
import sys

import pytest
from small_runs import case
from typer.testing import CliRunner

from mu2llm.cli import app
from mu2llm.config import load
from mu2llm.errors import Failure, UserError
from mu2llm.evaluation.external import measured, parsed
from mu2llm.evaluation.score import score, summary
from mu2llm.evaluation.scoring import Texts

CASES = tuple(case(i) for i in range(12))
REPORTS = tuple(each.report for each in CASES)
OVERLAP = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    ours, theirs = (set(row[side].split()) for side in ("prediction", "reference"))
    print(json.dumps({"id": row["id"], "score": len(ours & theirs) / max(1, len(ours | theirs))}))
"""


def command(tmp_path, code):
    path = tmp_path / "metric.py"
    path.write_text(code)
    return shlex.join([sys.executable, str(path)])


def test_names_and_commands_are_read():
    assert parsed(["a=run it --x=1", "Rad-Graph.F1=y"]) == {"a": "run it --x=1", "Rad-Graph.F1": "y"}


@pytest.mark.parametrize("given", [["a"], ["a="], ["=x"], ["a b=x"], ["green=x"], ["a=x", "a=y"]])
def test_what_is_no_name_and_command_is_said(given):
    with pytest.raises(UserError, match="--external"):
        parsed(given)


def test_it_stands_in_the_same_table_with_floors_and_intervals(tmp_path):
    for name, texts in (("references", REPORTS), ("constant", (REPORTS[0], *REPORTS[:11]))):
        rows = [
            {"id": each.id, "patient": each.patient, "report": text} for each, text in zip(CASES, texts, strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = ["--predictions", str(tmp_path / "constant.jsonl"), "--references", str(tmp_path / "references.jsonl")]
    asked = ["score", *places, "--out", str(tmp_path / "out"), "--preset", "tiny"]
    asked += ["--external", f"overlap={command(tmp_path, OVERLAP)}"]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False).stdout)
    own = found["metrics"]["overlap"]
    assert 0 < own["low"] < own["value"] < own["high"] <= 1 and own["n"] == 12
    assert set(found["floors"]) - {each for each, of in found["floors"].items() if "overlap" not in of} == {
        *("constant", "other_patient", "nearest", "reference")
    }
    assert found["floors"]["reference"]["overlap"] == 1 and "overlap" in found["shares"]
    assert "metric.py" in found["notes"]["overlap"]
    shown = CliRunner().invoke(app, asked, catch_exceptions=False, env={"COLUMNS": "300"}).stdout
    assert "overlap" in shown and "overlap" in (tmp_path / "out" / "report.html").read_text()


def texts():
    return {"own": Texts(CASES, REPORTS, REPORTS), "constant": Texts(CASES, REPORTS, REPORTS[:1] * 12)}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import sys; print('the weights are missing', file=sys.stderr); sys.exit(3)", "ended with 3: the weights"),
        ("print('loading')", r"line 1 of its stdout is not .*'loading'"),
        ('print(\'{"id": "z", "score": 1}\')', "an id that was not given to it: 'z'"),
        ('print(\'{"id": "own/case-00", "score": 1}\\n\' * 2)', "line 2 .*came before: 'own/case-00'"),
        ("pass", "no number for any of 24 reports"),
        ('print(\'{"id": "own/case-00", "score": NaN}\')', "no number for any of 24 reports"),
    ],
)
def test_what_fails_is_named(tmp_path, code, why):
    with pytest.raises(Failure, match=rf"--external m: .*{why}"):
        measured("m", command(tmp_path, code), texts())


def test_a_command_that_is_not_there_is_the_users_mistake():
    with pytest.raises(UserError, match="cannot be run"):
        measured("m", "/no/such/program", texts())


@pytest.mark.parametrize(("lost", "short"), [(["case-01"], True), ([], False)])
def test_what_has_no_number_is_counted_and_named_and_too_much_of_it_is_a_shortfall(tmp_path, lost, short):
    code = OVERLAP.replace(
        "    print", f"    if row['id'].rpartition('/')[2] in {lost}: row['id'] = None\n    if row['id']: print"
    )
    rows = [{"id": each.id, "patient": each.patient, "report": each.report} for each in CASES]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"external": {"overlap": command(tmp_path, code)}}
    settings = load("tiny", ["evaluation.text_encoder=none", "evaluation.bootstrap=100"])
    settings = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update=changes)})
    found = summary(score(str(tmp_path / "r.jsonl"), str(tmp_path / "r.jsonl"), str(tmp_path / "out"), settings))
    assert found["metrics"]["overlap"]["n"] == 12 - len(lost)
    line = "overlap: no number for 1 of 12 reports: case-01"
    assert (line in found["warnings"]) == (line in found["red_line"]) == short

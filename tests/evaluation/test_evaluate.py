"""`evaluate` from shards to files; scores anew from the files alone."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_runs import case, least
from typer.testing import CliRunner

from mu2llm import storage
from mu2llm.cli import app
from mu2llm.engine.predictions import Prediction
from mu2llm.errors import UserError
from mu2llm.evaluation import assess as assess_module
from mu2llm.evaluation import evaluate as evaluate_module
from mu2llm.evaluation import floors, text_metrics
from mu2llm.evaluation.evaluate import compare, compare_saved, evaluate, rescore
from mu2llm.evaluation.results import Header, Results
from mu2llm.records import Case

CASES = [case(i) for i in range(12)]


class Words:
    """Stands for BERTScore by an encoder."""

    identity = description = "words"

    def tokens(self, texts):
        import numpy as np

        return [np.eye(64)[[0, *(len(word) % 60 + 2 for word in text.split()), 1]] for text in texts]

    def scores(self, pairs):
        return text_metrics.bert_score(pairs, self)


@pytest.fixture
def no_encoder(monkeypatch):
    monkeypatch.setattr(assess_module, "BertScore", lambda name, settings: Words())


def predict(run, variant, texts, region=None, question="q"):
    same = {"region": region, "question": question, "index": 0, "tokens": 5, "finished": True, "seed": 0}
    return [
        Prediction(run=run, case_id=each.id, variant=variant, text=text, scan_of=each.id, **same)
        for each, text in zip(CASES, texts, strict=True)
    ]


def save(out):
    """A finished prediction of a perfect run, and of one that writes the next case's report."""
    right = [each.report for each in CASES]
    wrong = right[1:] + right[:1]
    questions = CASES[0].questions[0]
    models = [*predict("sft", "as_is", wrong), *predict("dpo", "as_is", right)]
    predictions = [
        *evaluate_module.by_table(models, CASES, [case(i) for i in range(20, 32)], 0),
        *predict("sft", "as_is", wrong),
        *predict("sft", "shuffled", wrong),
        *predict("sft", "zeroed", wrong),
        *predict("dpo", "as_is", right),
        *predict("dpo", "shuffled", wrong),
        *predict("dpo", "zeroed", ["The liver is normal."] * 12),
        *predict("dpo", "as_is", [c.questions[0].answer for c in CASES], "chest", questions.question),
        *(p for p in evaluate_module.without_model(CASES, CASES, "q", 0) if p.run != "prior"),
        *predict("prior", "as_is", ["No pleural effusion. The liver is normal."] * 12),
    ]
    storage.write_table(storage.join(out, "cases.parquet"), Case.table(CASES))
    storage.write_table(storage.join(out, "predictions.parquet"), Prediction.table(predictions))
    Header(
        identity="x",
        checkpoints={"sft": "s3://b/sft", "dpo": "s3://b/dpo"},
        data="shards",
        split="test",
        question="q",
        seed=0,
        prior="one of 3 training reports",
        histories={"sft": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]},
    ).write(out)


def only(out, run, name):
    """The saved evaluation of one run of `out`, below another name."""
    header, (cases, predictions) = Header.open(str(out)), evaluate_module.read_predictions(str(out))
    folder = str(out.parent / name)
    kept = [p for p in predictions if p.run == run or p.run in floors.NAMES]
    storage.write_table(storage.join(folder, "cases.parquet"), Case.table(cases))
    storage.write_table(storage.join(folder, "predictions.parquet"), Prediction.table(kept))
    header.model_copy(update={"checkpoints": {run: header.checkpoints[run]}, "identity": name}).write(folder)
    return folder


def test_evaluations_made_apart_are_paired_as_if_made_together(tmp_path, no_encoder):
    save(str(tmp_path / "both"))
    together = rescore(str(tmp_path / "both"), least())
    sft, dpo = (only(tmp_path / "both", run, name) for run, name in (("sft", "first"), ("dpo", "second")))
    apart = compare_saved([sft, dpo], str(tmp_path / "compared"), least())
    assert apart.differences == together.differences and apart.runs == together.runs
    told = CliRunner().invoke(app, ["compare", sft, dpo, "--out", str(tmp_path / "told")], catch_exceptions=False)
    assert "dpo − sft" in told.stdout and "GREEN" in told.stdout
    again = compare_saved([sft, only(tmp_path / "both", "sft", "third")], str(tmp_path / "same"), least())
    assert list(again.header.checkpoints) == ["sft (first)", "sft (third)"]
    [difference] = again.differences
    assert difference.metrics["green"].value == 0
    with pytest.raises(UserError, match=r"evaluation\.0 is first there, second here; another --out"):
        compare_saved([dpo, sft], str(tmp_path / "compared"), least())
    fewer = Case.table([case(i) for i in range(3)])
    storage.write_table(storage.join(dpo, "cases.parquet"), fewer)
    with pytest.raises(UserError, match="different cases"):
        compare_saved([sft, dpo], str(tmp_path / "other"), least())


def test_rescore_needs_nothing_but_the_files(tmp_path, no_encoder):
    out = str(tmp_path)
    save(out)
    results = rescore(out, least())
    assert Results.open(out) == results
    dpo, sft = (results.summary(run) for run in ("dpo", "sft"))
    assert [dpo[name]["value"] for name in ("finding_f1", "green", "bleu_1", "rouge_l")] == [1, 1, 1, 1]
    assert dpo["finding_f1"]["n"] == 12
    assert sft["finding_f1"]["value"] < 0.5
    assert results.floors["constant"]["finding_f1"].value == 0 == dpo["floors"]["constant"]["finding_f1"]
    assert dpo["shares"]["finding_f1"] == 1 and dpo["below_floor"] == []
    assert "green" in sft["below_floor"] and "this is the floor" in sft["audits"]["red_line"]
    assert dpo["finding_f1_shuffled"]["value"] == sft["finding_f1"]["value"]
    assert dpo["green_rules_table"]["value"] == 1 and dpo["finding_f1_table"]["value"] == 1
    assert sft["finding_f1_table"]["value"] == sft["finding_f1"]["value"]
    assert dpo["distinct_reports"] == len({each.report for each in CASES}) / 12
    assert dpo["audits"]["passed"] and not sft["audits"]["passed"]
    assert sft["audits"]["red_line"].startswith("does not look at the scan")
    difference = results.difference("dpo", "sft")["green"]
    assert difference["value"] == pytest.approx(1 - sft["green"]["value"]) and difference["low"] > 0
    assert results.paraphrase.value == 1 and results.judge_warning == ""
    assert results.difference("dpo", "sft")["green_matched_length"]["n"] == 12
    assert "green_length_correlation" in dpo
    assert json.dumps(dpo)  # what --json prints


def test_empty_reports_score_nothing_and_are_counted(tmp_path, no_encoder):
    """They left the mean: two right reports and ten empty ones had a GREEN of 1.0."""
    save(str(tmp_path))
    cases, predictions = evaluate_module.read_predictions(str(tmp_path))
    kept = {case.id for case in cases[:2]}
    emptied = [
        p if p.case_id in kept or p.variant != "as_is" else p.model_copy(update={"text": ""}) for p in predictions
    ]
    storage.write_table(str(tmp_path / "predictions.parquet"), Prediction.table(emptied))
    told = rescore(str(tmp_path), least()).summary("dpo")
    assert (told["green"]["value"], told["green"]["n"]) == (pytest.approx(2 / 12), 12)
    assert told["bleu_1"]["value"] <= 2 / 12 + 1e-6
    assert (
        "10 of 12 reports cannot be judged and score 0, 10: the candidate report is empty" in told["audits"]["warnings"]
    )


def test_tables(tmp_path, no_encoder):
    out = str(tmp_path)
    save(out)
    results = rescore(out, least())
    judgements = pq.read_table(tmp_path / "judgements.parquet")
    assert judgements.num_rows == 24 and judgements["run"].unique().to_pylist() == ["sft", "dpo"]
    metrics = pq.read_table(tmp_path / "metrics.parquet").to_pylist()
    keys = {(row["run"], row["group"], row["name"], row["metric"]) for row in metrics}
    assert ("dpo", "finding", "pleural effusion", "recall") in keys
    assert ("dpo", "label", "Pleural effusion", "f1") in keys
    assert ("dpo", "region", "chest", "rouge_l") in keys
    assert ("dpo", "difference", "sft", "finding_f1") in keys
    assert ("other_patient", "floor", "", "bleu_1") in keys
    [effusion] = results.runs["dpo"].findings
    assert effusion.n == sum(bool(each.findings) for each in CASES)
    [chest] = results.runs["dpo"].regions
    assert chest.n == 12 and chest.metrics["finding_f1"].value == 1


def test_scores_do_not_change_when_made_again(tmp_path, no_encoder):
    save(str(tmp_path))
    assert rescore(str(tmp_path), least()) == rescore(str(tmp_path), least())


def test_nothing_saved_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no finished predictions .*run mu2llm evaluate"):
        rescore(str(tmp_path), least())
    with pytest.raises(UserError, match="holds no evaluation"):
        Results.open(str(tmp_path))


@pytest.mark.slow
def test_from_shards_to_files(ray_cluster, shards, checkpoints, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    results = compare(checkpoints, shards.uri, out, least())
    assert list(results.runs) == ["sft", "dpo"]
    assert set(results.floors) == set(floors.TITLES)
    assert len(list((Path(shards.uri) / "floors").iterdir())) == 1  # kept with the data
    assert results.cases == 10
    assert not results.runs["sft"].audit.passed  # it has learnt nothing
    assert results.header.histories["sft"][0] == {"step": 0, "loss": 3.0}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"predictions.parquet", "judgements.parquet", "metrics.json", "cases.parquet"} <= names
    assert "predictions.state" not in names
    # again: nothing is written anew
    monkeypatch.setattr(evaluate_module, "generate", lambda *_: pytest.fail("generated again"))
    assert compare(checkpoints, shards.uri, out, least()) == results
    with pytest.raises(UserError, match=r"checkpoint\.dpo is \w{12}… there, the default here; --fresh"):
        evaluate(checkpoints["sft"], shards.uri, out, least())

"""One table of everything; only like is ranked with like; who does not look is told so in each form."""

import io

import pytest
from rich.console import Console

from mu2llm.evaluation import leaderboard
from mu2llm.evaluation.floors import Level
from mu2llm.evaluation.leaderboard import Row
from mu2llm.records import Estimate

LINE = "does not look at the scan: finding_f1 0.20 is much the same with other patients' scans"


FLOORS = {"constant": {"green": Estimate(value=0.25, low=0.2, high=0.3, n=10)}}
NOTE = "below its floor: CRG 0.333 (constant 0.362)"


def row(run, green, data="phantoms", red_line="", judge="rules"):
    metrics = {"green": Estimate(value=green, low=green - 0.1, high=green + 0.1, n=10), "bleu_1": None}
    beside = {
        "levels": {"green": Level(value=green, low=green, floor=0.25, of="constant", ceiling=1)},
        "floors": FLOORS,
    }
    beside |= {"split_hash": "0a1b2c3d4e5f", "notes": [NOTE] if run == "sft" else []}
    return Row(run=run, data=data, split="test", judge=judge, cases=10, metrics=metrics, red_line=red_line, **beside)


ROWS = [row("sft", 0.3), row("cheat", 0.9, red_line=LINE), row("dpo", 0.4), row("other", 0.8, judge="hf:x")]


def rendered(form):
    table = [*ROWS, *leaderboard.paper()]
    if form == "terminal":
        console = Console(file=io.StringIO(), width=220)
        console.print(*leaderboard.terminal(table))
        return " ".join(console.file.getvalue().split()).replace(" – ", "–")  # captions and intervals wrap
    return getattr(leaderboard, form)(table)


def test_ranked_within_data_and_judge_and_the_red_line_last():
    first, second = leaderboard.leagues(ROWS)
    assert [each.run for each in first.rows] == ["dpo", "sft", "cheat"]
    assert [each.run for each in second.rows] == ["other"]
    elsewhere = ROWS[0].model_copy(update={"split_hash": "other cases"})
    assert len(leaderboard.leagues([ROWS[0], elsewhere])) == 2


def test_the_papers_numbers_are_apart_with_their_source():
    *_, ablation = leaderboard.leagues([*leaderboard.paper(), *ROWS])
    assert "arXiv 2507.00316, table 2" in ablation.title
    assert ablation.note.startswith("not comparable")
    ct_rate = next(each for each in leaderboard.paper() if each.data == "CT-RATE" and each.run.endswith("(SFT&DPO)"))
    assert ct_rate.metrics == {"rouge_1": 0.539, "meteor": 0.359, "bert_score": 0.890, "green": 0.429}


@pytest.mark.parametrize("form", ["terminal", "markdown", "html"])
def test_every_form_has_all_of_it(form):
    text = rendered(form)
    for run in ("sft", "dpo", "cheat", "other", "CT-CHAT-8B", "Baseline (LinVT)"):
        assert run in text
    assert "does not look at the scan" in text
    assert "not comparable" in text
    assert "one typical training report" in text and "0.250" in text and "0a1b2c3d4e5f" in text
    assert NOTE in text
    assert "0.400" in text and "0.30–0.50" in text and "0.429" in text


def test_names_cannot_break_out_of_the_table():
    evil = [row("<script>|x", 0.5)]
    assert "<script>" not in leaderboard.html(evil)
    assert "\\|x" in leaderboard.markdown(evil)


@pytest.mark.slow
def test_rows_come_back_from_the_tracking_store():
    from mlflow.tracking import MlflowClient

    from mu2llm import tracking

    rows = [each.model_copy(update={"checkpoint": f"s3://b/{each.run}"}) for each in ROWS]
    for each in rows:
        leaderboard.track(each)
    client = MlflowClient(tracking_uri=tracking.store())
    [experiment] = client.search_experiments(filter_string=f"name = '{tracking.EXPERIMENT}'")
    found = client.search_runs([experiment.experiment_id])
    assert len(found) == 4
    assert {run.data.metrics["green"] for run in found} == {0.3, 0.9, 0.4, 0.8}
    back = leaderboard.tracked(run.data.tags for run in [*found, *found])
    assert sorted(back, key=lambda each: each.run) == sorted(rows, key=lambda each: each.run)

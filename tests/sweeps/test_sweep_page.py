"""The page and the tables of a sweep and of an ablation, from made-up trials."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from mu2llm import config
from mu2llm.records import Estimate
from mu2llm.sweeps import ablation, ablation_page, results
from mu2llm.sweeps.final import Final
from mu2llm.sweeps.page import write_page
from mu2llm.sweeps.space import Space
from mu2llm.sweeps.sweep import Sweep, _summary
from mu2llm.sweeps.trial import Point, Trial


def made_up(space, n=12):
    grid = space.grid()
    statuses = ["done", "stopped", "done", "done", "infeasible", "failed"]
    trials = []
    for i in range(n):
        status = statuses[i % len(statuses)]
        good = {"finding_f1": 0.1 + 0.03 * i, "visual_tokens": float(8 + i % 3), "green": 0.2 + 0.01 * i, "n": 20.0}
        metrics = good if status in ("done", "stopped") else {}
        history = [{**metrics, "step": float(step)} for step in (5, 10)] if metrics else []
        point = Point(params=grid[i % 5 * 7], seed=i // 5, data="D", init="C")
        why = "" if metrics else "CUDA out of memory <b>here</b>"
        trials.append(
            Trial(
                id=f"t{i}", number=i, point=point, status=status, metrics=metrics, history=history, why=why, seconds=9
            )
        )
    return trials


@pytest.fixture
def sweep(tmp_path):
    given = config.load("tiny", ["sweep.objective=[finding_f1,visual_tokens]"])
    space = Space.load("tokenizer", given)
    return Sweep("tokenizer", "sft", space, given, "D", "C", "D", "0", str(tmp_path))


def estimate(value):
    return Estimate(value=value, low=value - 0.1, high=value + 0.1, n=20)


@pytest.fixture
def final():
    sides = {
        name: {"finding_f1": estimate(0.4), "green": estimate(0.3)} for name in ("winner", "default", "difference")
    }
    return Final(
        **sides, seeds=[100, 101], split="test", cases=20, decided_by="finding_f1", by_seed={}, better=False,
        said="the winner is not better than the default", checkpoints=["c"],
    )  # fmt: skip


def test_a_page_needs_nothing_beside_it_and_says_all(sweep, final):
    trials = made_up(sweep.space)
    objective = sweep.experiment.sweep.objective
    rows = results.ranked(trials, objective)
    found = _summary(sweep, trials, rows, results.winner(rows, objective), final, 2)
    uri = write_page(sweep, trials, rows, found, final)
    page = Path(uri).read_text()
    titles = ("Finished points", "Optimisation history", "What mattered", "Parallel coordinates", "Pareto front")
    titles += ("Learning curves",)
    assert all(f"<h2>{title}</h2>" in page for title in titles)
    assert page.count("<svg") == 6
    assert not re.search(r'(src|href)="?(https?:|/)', page)
    assert "&lt;b&gt;here" in page
    assert "mu2llm train sft --data D --init C" in page
    assert found["statuses"] == {"done": 6, "stopped": 2, "infeasible": 2, "failed": 2}
    assert found["front"]


def test_a_terminal_shows_what_was_repeated_with_its_interval(sweep):
    rows = results.ranked(made_up(sweep.space), sweep.experiment.sweep.objective)
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(results.terminal(rows, sweep.experiment.sweep.objective))
    told = console.export_text()
    assert "Findings F1" in told and "visual tokens" in told
    assert any(len(row.trials) > 1 for row in rows)
    assert "★" in told


def test_an_ablation_stands_beside_the_paper(tmp_path):
    cells = [
        ablation.Cell(
            variant=name,
            fraction=share,
            seeds=[0, 1, 2],
            metrics={metric: estimate(0.2 + 0.05 * i) for metric in ablation.METRICS},
            minus_baseline={metric: estimate(0.05 * i) if i else None for metric in ablation.METRICS},
            published=dict(zip(ablation.OF_TABLE_2, ablation.PUBLISHED[name], strict=True)) if share == 1 else {},
        )
        for i, name in enumerate([*ablation.VARIANTS, ablation.DPO])
        for share in ((1.0, 0.1) if name in ("all", ablation.DPO) else (1.0,))
    ]
    found = {
        "cases": 20,
        "split": "test",
        "judge": "rules",
        "note": ablation.NOTE,
        "missing": {"all + DPO/0.1/0": "no pair"},
    }
    ablation_page.write_page(str(tmp_path), cells, found)
    ablation_page.write_plot(str(tmp_path), cells)
    page = (tmp_path / "ablation.html").read_text()
    assert page.count("<svg") == 2
    assert "0.204" in page and "no pair" in page and "over the batch" in page
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(ablation_page.terminal(cells, found))
    assert "0.204" in console.export_text()

"""A sweep's page and its table for a terminal, from recorded trials."""

import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from mu2llm import config
from mu2llm.records import Estimate
from mu2llm.stages.job import Watch
from mu2llm.sweeps import results
from mu2llm.sweeps.final import Final
from mu2llm.sweeps.space import Space
from mu2llm.sweeps.study import Study, database
from mu2llm.sweeps.sweep import _write
from mu2llm.sweeps.trial import Plan, Point, Trial

STATUSES = ["done", "stopped", "done", "done", "infeasible", "failed"]


def recorded(study, grid, n=12):
    """Twelve trials of five points."""
    points = [Point(params=grid[i % 5 * 7 % len(grid)], seed=i // 5) for i in range(n)]
    study.go_on(config.load("tiny").sweep, points)
    for i in range(n):
        status = STATUSES[i % len(STATUSES)]
        metrics = {"finding_f1": 0.1 + 0.03 * i, "visual_tokens": float(8 + i % 3), "green": 0.2 + 0.01 * i, "n": 20.0}
        metrics |= {"finding_f1_low": 0.05, "finding_f1_high": 0.5}
        metrics = metrics if status in ("done", "stopped") else {}
        history = [{**metrics, "step": float(step)} for step in (5, 10)] if metrics else []
        why = "" if metrics else "CUDA out of memory <b>here</b>"
        told = {"status": status, "metrics": metrics, "history": history, "why": why, "seconds": 9}
        point = study.propose(str(i))
        study.record(str(i), Trial(id=f"t{i}", point=point, **told))
    return study.trials()


def plan_of(objective, out):
    given = config.load("tiny", [f"sweep.objective=[{objective}]"])
    domains = Space.load("tokenizer", given).domains
    where = {"data": "D", "init": "C", "shards": "D", "checksum": "0", "out": str(out), "watch": Watch()}
    values = given.model_dump(mode="json")
    return Plan(kind="tokenizer", stage="sft", experiment=values, domains=domains, **where)


def study_of(plan):
    return Study(database(plan.out), "s", plan.base.sweep.objective, Point(seed=0), plan.space)


@dataclass
class Written:
    plan: Plan
    study: Study
    rows: list[results.Row]
    found: dict
    page: str


@pytest.fixture(scope="module", params=["finding_f1,visual_tokens", "finding_f1"])
def written(request, tmp_path_factory):
    plan = plan_of(request.param, tmp_path_factory.mktemp("page"))
    study = study_of(plan)
    trials = recorded(study, plan.space.grid())
    found = _write(plan, study, trials, 2, FINAL)
    return Written(plan, study, results.ranked(trials, study.objective), found, Path(found["page"]).read_text())


ESTIMATES = {name: Estimate(value=0.4, low=0.3, high=0.5, n=20) for name in ("finding_f1", "green")}
FINAL = Final(
    **dict.fromkeys(("winner", "default", "difference"), ESTIMATES), seeds=[100, 101], split="test", cases=20,
    decided_by="finding_f1", by_seed={}, better=False, said="the winner is not better than the default",
    checkpoints=["c"],
)  # fmt: skip


def test_a_page_needs_nothing_beside_it_and_shows_what_the_command_prints(written):
    found, page, several = written.found, written.page, len(written.study.objective) > 1
    titles = ["Finished points", "Optimisation history", "Importance of each key", "Slices", "Parallel coordinates"]
    titles += ["Learning curves", *(["Pareto front"] if several else [])]
    assert all(f"<h2>{title}</h2>" in page for title in titles)
    assert page.count("<svg") == len(titles)
    assert not re.search(r'(src|href)="?(https?:|/)', page)
    assert "&lt;b&gt;here" in page and "<b>here" not in page
    assert "mu2llm train sft --data D --init C" in page
    assert FINAL.said in page and "Winner and default, 2 seeds each" in page
    assert found["statuses"] == {"done": 6, "stopped": 2, "infeasible": 2, "failed": 2}
    assert (found["front"] is None) != several
    assert Path(written.plan.out, "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_every_point_is_a_row_with_its_intervals_and_can_be_sorted_by_its_values(written):
    table = written.page[written.page.index('<table class="sortable">') :]
    assert table.count("<tr") == 1 + len(written.rows)
    values = [float(value) for value in re.findall(r'<td data-value="([^"]+)">', table)]
    estimates = [estimate for row in written.rows if (estimate := row.estimate("finding_f1"))]
    assert len(estimates) == 5
    for estimate in estimates:
        assert estimate.value in values
        assert f"<small>{estimate.low:.3g} … {estimate.high:.3g}</small>" in table
    assert table.count('class="front"') == len(results.front(written.rows, written.study.objective))


def test_a_terminal_shows_what_was_repeated_with_its_interval(written):
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(results.terminal(written.rows, written.study.objective))
    text = console.export_text()
    assert any(len(row.trials) > 1 for row in written.rows)
    assert "1★" in text and results.cell(written.rows[0].estimate("finding_f1")) in text


def test_a_sweep_of_a_single_finished_trial_has_a_page(tmp_path):
    plan = plan_of("finding_f1", tmp_path)
    study = study_of(plan)
    found = _write(plan, study, recorded(study, plan.space.grid(), 1), 1, None)
    assert found["trials"] == 1 and found["importance"]["finding_f1"] == {}
    page = Path(found["page"]).read_text()
    assert "Importance of each key" not in page and "Winner and default" not in page

"""One table of everything; only like is ranked with like; who does not look is told so in each form."""

import io
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from rich.console import Console

from mu2llm.evaluation import leaderboard, leaderboard_page, published
from mu2llm.evaluation.floors import Level
from mu2llm.evaluation.leaderboard import Named, Row
from mu2llm.evaluation.results import TITLES
from mu2llm.records import Estimate

AXE = Path(__file__).parents[2] / "mu2llm/serving/viewer/node_modules/axe-core/axe.min.js"
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
    return leaderboard_page.html(table) if form == "html" else leaderboard.markdown(table)


def test_ranked_within_data_and_judge_and_the_red_line_last():
    first, second = leaderboard.leagues(ROWS)
    assert [each.run for each in first.rows] == ["dpo", "sft", "cheat"]
    assert [each.run for each in second.rows] == ["other"]
    elsewhere = ROWS[0].model_copy(update={"split_hash": "other cases"})
    assert len(leaderboard.leagues([ROWS[0], elsewhere])) == 2


def test_the_papers_numbers_are_apart_with_their_source():
    ours, _, *others = leaderboard.leagues([*leaderboard.paper(), *ROWS])
    assert not ours.rows[0].source and all(league.rows[0].source for league in others)
    [ablation] = [each for each in others if "arXiv 2507.00316, table 2" in each.title]
    assert all(each.note.startswith("not comparable: ") and each.rows[0].url.startswith("https://") for each in others)
    assert ablation.rows[0].run == "μ²LLM-1B (SFT&DPO)"
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
    page = leaderboard_page.html(evil)
    assert page.count("<script>") == 2 and "&lt;script&gt;|x" in page
    assert "\\|x" in leaderboard.markdown(evil)


def test_every_number_is_drawn_between_its_floor_and_ceiling():
    league = leaderboard.leagues(ROWS)[0].model_copy()
    drawn = leaderboard_page.strip(league, "green", Estimate(value=0.5, low=0.25, high=1, n=9))
    middle, left, right = 4 + 84 / 2, 4 + 84 / 4, 4 + 84
    assert (
        f'cx="{middle}"' in drawn and f'd="M{left} 11.0H{right}.0"' in drawn and f'"floor best" d="M{left} 0' in drawn
    )
    assert 'class="dot"' in drawn and "below" in leaderboard_page.strip(league, "green", 0.25)
    assert "circle" not in leaderboard_page.strip(league, "green", None)
    assert 'cx="46.0"' in leaderboard_page.strip(league, "green_length_correlation", 0.0)


def test_the_page_has_findings_and_lengths():
    named = [Named(name="renal cyst", n=3, f1=Estimate(value=0.4, low=0.1, high=0.7, n=3))]
    more = {"findings": named, "words": (11, 22, 33), "reference_words": (1, 44, 3)}
    page = leaderboard_page.html([ROWS[0].model_copy(update=more), ROWS[2]])
    for text in ("renal cyst", "0.10–0.70", ">22<", ">44<", "cases of split <b>test</b>", "judge <b>rules</b>"):
        assert text in page
    assert "The 18 labels" not in page


def test_published_numbers_have_their_source_and_a_reason():
    for each in published.publications():
        assert each.why and each.url.startswith("https://") and set(each.columns) <= set(TITLES)
        assert each.floors_of or not each.floors
    with pytest.raises(ValueError, match="1 numbers for 2 columns"):
        published.Publication(
            **{"source": "s", "url": "u", "data": "d", "split": "s", "judge": "j", "why": "w"},
            columns=["green", "crg"],
            rows={"a": [1.0]},
        )


def test_a_row_of_any_length_comes_back_from_tags(caplog):
    """MLflow cuts off what is longer than 8000 characters; a real row has 14,000."""
    long = ROWS[0].model_copy(update={"notes": ["x" * 20_000], "checkpoint": "s3://b/c"})
    tags = leaderboard._tags(long)
    assert len(tags) > 3 and max(map(len, tags.values())) <= 8000
    assert leaderboard.tracked([tags]) == [long]
    cut = {"leaderboard_row": tags["leaderboard_row"], "checkpoint": "s3://b/c"}
    assert leaderboard.tracked([cut]) == [] and "s3://b/c is cut off" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_a_browser_it_sorts_and_axe_finds_nothing(theme, tmp_path):
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    if not AXE.is_file():
        pytest.skip("axe is not installed (make viewer)")
    named = [Named(name="renal cyst", n=3, f1=Estimate(value=f1, low=0.1, high=1, n=3)) for f1 in (0.2, 0.6, 1)]
    full = ROWS[0].model_copy(update={"findings": named, "words": (1, 2, 3), "reference_words": (1, 2, 3)})
    (tmp_path / "board.html").write_text(leaderboard_page.html([full, *ROWS[1:], *leaderboard.paper()]))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=theme, viewport={"width": 1400, "height": 1000})
        wrong = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"file://{tmp_path}/board.html")
        table = page.locator("table").first
        names = table.locator("tbody tr:first-child th")
        assert [text.split()[0] for text in names.all_inner_texts()] == ["dpo", "sft", "cheat"]
        head = table.locator("thead button", has_text="GREEN")
        for order, direction in ((["cheat", "dpo", "sft"], "descending"), (["sft", "dpo", "cheat"], "ascending")):
            head.click()
            assert [text.split()[0] for text in names.all_inner_texts()] == order
            assert table.locator(f'th[aria-sort="{direction}"]').count() == 1
        assert table.locator("tfoot tr").count() == 1
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        page.evaluate(AXE.read_text())
        run = "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa']}).then(result => result.violations)"
        assert [(each["id"], [node["target"] for node in each["nodes"]]) for each in page.evaluate(run)] == []
        assert wrong == []
        browser.close()


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

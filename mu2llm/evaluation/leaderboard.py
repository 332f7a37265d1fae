"""All evaluations as one table: terminal and Markdown, and the page's rows. Only rows of the same data, split and judge
are ranked together; what was published stands below, with its source."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ValidationError
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mu2llm import tracking
from mu2llm.evaluation import published
from mu2llm.evaluation.floors import TITLES as FLOORS
from mu2llm.evaluation.floors import Level
from mu2llm.evaluation.results import TITLES, Group, Results
from mu2llm.records import Estimate

logger = logging.getLogger(__name__)
SHOWN = (
    *("finding_f1", "green", "green_length_correlation", "ce_macro_f1", "crg"),
    *("bleu_1", "bleu_mean", "rouge_1", "rouge_l", "meteor", "bert_score"),
)


ROW = "leaderboard_row"
"""The tag under which a tracked run keeps its row, as JSON; what is longer than a tag goes on in `…_1`, `…_2`."""
TAG = 6000  # characters; MLflow cuts off what is longer than 8000


class Named(BaseModel):
    """The F1 of one finding or label; `n` cases of the truth have it."""

    name: str
    n: int
    f1: Estimate | None


class Row(BaseModel):
    """One line: numbers (a plain one has no interval) with what they must share to be comparable.

    `identity` is the digest of the checkpoint's weights then; `foreign` is where reports came from that we did
    not write, `source` names a publication, "" is ours, `why` says why it is not comparable. `floors` is what needs no
    model, on the same cases or on `floors_of`, `levels` where the metrics stand between floor and ceiling; `others` are
    columns that not all tables have. `words` are of the reports and of the references: 5th, 50th and 95th percentile.
    """

    run: str
    data: str
    split: str
    split_hash: str = ""
    judge: str
    cases: int | None
    metrics: dict[str, Estimate | float | None]
    levels: dict[str, Level] = {}
    floors: dict[str, dict[str, Estimate | float | None]] = {}
    others: list[str] = []
    floors_of: str = ""
    findings: list[Named] = []
    labels: list[Named] = []
    words: tuple[float, float, float] | None = None
    reference_words: tuple[float, float, float] | None = None
    red_line: str = ""
    notes: list[str] = []
    checkpoint: str | None = None
    foreign: str = ""
    identity: str = ""
    report: str | None = None
    source: str = ""
    url: str = ""
    why: str = ""

    @property
    def label(self) -> str:
        """How tables call it."""
        return f"{self.run} (foreign)" if self.foreign else self.run

    @property
    def league(self) -> tuple[str, str, str, str, str]:
        """Rows are comparable within it."""
        return self.source, self.data, self.split, self.split_hash, self.judge


def rows(results: Results, report: str | None = None) -> list[Row]:
    """The rows of an evaluation: each run, with the floors of its cases."""
    header = results.header
    return [
        Row(
            run=run,
            data=header.data,
            split=results.split or header.split,
            split_hash=results.split_hash,
            judge=results.judge,
            cases=results.cases,
            metrics=result.metrics,
            levels=result.levels,
            others=results.others,
            floors={floor: dict(metrics) for floor, metrics in results.floors.items()},
            findings=_named(result.findings),
            labels=_named(result.labels),
            words=result.audit.words,
            reference_words=result.audit.reference_words,
            red_line=result.audit.red_line,
            notes=[*result.audit.warnings, *([results.judge_warning] if results.judge_warning else [])],
            checkpoint=None if header.foreign else header.checkpoints.get(run),
            foreign=header.foreign,
            identity=header.identities.get(run, ""),
            report=report,
        )
        for run, result in results.runs.items()
    ]


def _named(groups: Sequence[Group]) -> list[Named]:
    return [Named(name=each.name, n=each.n, f1=each.metrics.get("f1")) for each in groups]


def track(row: Row) -> None:
    """Puts a row into the tracking store, as a run of the stage `evaluate` with its metrics."""
    of = {"data": row.data, "split": row.split, "judge": row.judge}
    what = {"foreign": row.foreign} if row.checkpoint is None else {"checkpoint": row.checkpoint}
    tags = {**what, **_tags(row), "commit": tracking.git_commit() or ""}
    run = tracking.start_stage("evaluate", of, {**of, **tags})
    numbers = {name: value for name, value in row.metrics.items() if isinstance(value, Estimate)}
    run.log({name: number.value for name, number in numbers.items()}, step=0)
    tracking.end_stage(run, {"report": row.report or "", "red_line": row.red_line})


def _tags(row: Row) -> dict[str, str]:
    text = row.model_dump_json()
    parts = [text[start : start + TAG] for start in range(0, len(text), TAG)]
    return {f"{ROW}_{number}" if number else ROW: part for number, part in enumerate(parts)}


def _untagged(tags: Mapping[str, str]) -> Row | None:
    """The row in a run's tags; None, and a line in the log, where it is not whole."""
    names = [ROW, *(f"{ROW}_{number}" for number in range(1, len(tags)))]
    text = "".join(tags.get(name, "") for name in names)
    try:
        return Row.model_validate_json(text)
    except ValidationError:
        of = tags.get("checkpoint") or tags.get("foreign")
        logger.warning("left out: the row of %s is cut off in the tracking store; evaluate it anew with --fresh", of)
        return None


def tracked(tags: Iterable[Mapping[str, str]]) -> list[Row]:
    """The rows in the tags of tracked runs; of a checkpoint evaluated again on the same data, the first given."""
    found: dict[tuple[str, ...], Row] = {}
    for each in tags:
        if ROW in each and (row := _untagged(each)):
            found.setdefault((row.checkpoint or row.foreign or row.run, *row.league), row)
    return list(found.values())


def paper() -> list[Row]:
    """What the paper and others published, by source and data."""
    return [
        Row(
            run=run,
            data=each.data,
            split=each.split,
            judge=each.judge,
            cases=None,
            metrics=dict(each.metrics(run)),
            floors={floor: dict(metrics) for floor, metrics in each.floors.items()},
            floors_of=each.floors_of,
            source=each.source,
            url=each.url,
            why=each.why,
        )
        for each in published.publications()
        for run in each.rows
    ]


class League(BaseModel):
    """Rows that may be compared, best GREEN first (without it, the best of their first metric), those with a red line
    last."""

    title: str
    note: str
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """The metrics that any of the rows has."""
        shown = dict.fromkeys([*SHOWN[:2], *(name for row in self.rows for name in row.others), *SHOWN])
        return [name for name in shown if any(row.metrics.get(name) is not None for row in self.rows)]

    @property
    def floors(self) -> dict[str, dict[str, Estimate | float | None]]:
        """What needs no model, on the same cases."""
        known = next((row.floors for row in self.rows if row.floors), {})
        return {name: known[name] for name in FLOORS if name in known}


def leagues(table: Iterable[Row]) -> list[League]:
    """Ours in the order of their first rows, then what was published."""
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in table:
        grouped.setdefault(row.league, []).append(row)
    found = []
    for (origin, data, split, split_hash, judge), members in sorted(grouped.items(), key=lambda item: bool(item[0][0])):
        by = next((name for name in ("green", *SHOWN) if any(row.metrics.get(name) for row in members)), "green")
        ranked = sorted(members, key=lambda row: (bool(row.red_line), -_value(row.metrics.get(by))))
        if origin:
            of = f"; floors of {members[0].floors_of}" if members[0].floors_of else ""
            found.append(League(title=f"{data} ({origin})", note=f"not comparable: {members[0].why}{of}", rows=ranked))
        else:
            cases = f"{members[0].cases} cases of " if members[0].cases else ""
            same = f"{split} ({split_hash})" if split_hash else split
            found.append(League(title=f"{data}, {cases}split {same}", note=f"judge {judge}", rows=ranked))
    return found


def _value(number: Estimate | float | None) -> float:
    return number.value if isinstance(number, Estimate) else -1.0 if number is None else number


def cell(number: Estimate | float | None) -> str:
    """A number as the tables have it: with its interval, if it has one."""
    if number is None:
        return "–"
    if isinstance(number, Estimate):
        return f"{number.value:.3f} ({number.low:.2f}–{number.high:.2f})"
    return f"{number:.3f}"


def terminal(table: Sequence[Row]) -> list[Table]:
    """One rich table a league."""
    found = []
    for league in leagues(table):
        columns = league.columns
        caption = Text(league.note, style="dim")
        for row in league.rows:
            if row.red_line:
                caption.append(f"\n✗ {row.run} {row.red_line}", style="bold red")
            for note in row.notes:
                caption.append(f"\n{row.run}: {note}", style="yellow")
        shown = Table(
            title=Text(league.title), caption=caption, title_justify="left", caption_justify="left", box=SIMPLE_HEAD
        )
        shown.add_column("run")
        for name in columns:
            shown.add_column(TITLES.get(name, name), justify="right", overflow="fold")
        for row in league.rows:
            numbers = [_wrapping(row.metrics.get(name)) + _share(row.levels.get(name)) for name in columns]
            shown.add_row(escape(row.label), *numbers, style="red" if row.red_line else "dim" if row.source else None)
        for name, metrics in league.floors.items():
            shown.add_row(FLOORS[name], *(_plain(metrics.get(column)) for column in columns), style="dim italic")
        found.append(shown)
    return found


def differences(results: Results) -> Table:
    """Paired differences with their intervals; those that exclude zero stand out."""
    names = [escape(f"{each.ours} − {each.theirs}") for each in results.differences]
    shown = Table(
        "", *names, title="Paired differences, 95 % bootstrap intervals", title_justify="left", box=SIMPLE_HEAD
    )
    for metric in dict.fromkeys([*TITLES, *results.others]):
        numbers = [each.metrics.get(metric) for each in results.differences]
        if any(numbers):
            shown.add_row(TITLES.get(metric, metric), *(_signed(number) for number in numbers))
    return shown


def _signed(number: Estimate | None) -> Text:
    if number is None:
        return Text("–")
    clear = number.low > 0 or number.high < 0
    return Text(f"{number.value:+.3f} ({number.low:+.3f} … {number.high:+.3f})", style="bold" if clear else "dim")


def _wrapping(number: Estimate | float | None) -> str:
    """A cell that a narrow terminal breaks at its spaces."""
    return cell(number).replace(" (", "\n").replace("–", " – ").rstrip(")") if number is not None else cell(number)


def _share(level: Level | None) -> str:
    return f"\n{level.description}" if level else ""


def _plain(number: Estimate | float | None) -> str:
    return cell(number).partition(" (")[0]


def markdown(table: Sequence[Row]) -> str:
    """One table a league."""
    parts = []
    for league in leagues(table):
        columns = league.columns
        lines = [f"### {league.title}", "", league.note, ""]
        lines.append(_line("run", *(TITLES.get(name, name) for name in columns)))
        lines.append(_line("---", *("---:" for _ in columns)))
        lines += [_line(row.label, *(cell(row.metrics.get(name)) for name in columns)) for row in league.rows]
        for name, metrics in league.floors.items():
            lines.append(_line(f"*{FLOORS[name]}*", *(_plain(metrics.get(column)) for column in columns)))
        lines += ["", *(f"- **✗ {row.run} {row.red_line}**" for row in league.rows if row.red_line)]
        lines += [f"- {row.run}: {note}" for row in league.rows for note in row.notes]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts) + "\n"


def _line(*cells: str) -> str:
    escaped = (text.replace("|", "\\|") for text in cells)
    return f"| {' | '.join(escaped)} |"

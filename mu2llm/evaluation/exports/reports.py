"""Reports as others take them: VLM3D's results.json, and RadMatch's two folders of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mu2llm import storage
from mu2llm.cases import Shards
from mu2llm.engine.predictions import Prediction
from mu2llm.errors import UserError
from mu2llm.evaluation import foreign
from mu2llm.evaluation.exports import place
from mu2llm.evaluation.results import Header


def vlm3d(predictions: str, out: str, run: str | None = None, fresh: bool = False) -> dict[str, Any]:
    """Writes reports as the VLM3D challenge's results.json; what the command prints.

    `predictions` are all that `mu2llm score` reads, what `generate --json` printed, or a folder that `evaluate` wrote,
    of which `run` is taken, else the last one. Raises UserError where an id comes twice or `out` is there.
    """
    reports = _reports(predictions, run)
    place.clear(out, fresh)
    storage.write_json(out, results_json(reports))
    return {"out": out, "reports": len(reports), "empty": [name for name, text in reports.items() if not text]}


def results_json(reports: Mapping[str, str]) -> dict[str, Any]:
    """Image name without suffix → report, in the shape of forithmus/VLM3D-Dockers, reportgen_example_docker."""
    return {
        "name": "Generated reports",
        "type": "Report generation",
        "generated_reports": [{"input_image_name": name, "report": text} for name, text in reports.items()],
        "version": {"major": 1, "minor": 0},
    }


def radmatch(
    predictions: str,
    references: str,
    out: str,
    split: str | None = None,
    run: str | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Writes `out`/reports_gt and `out`/reports_pred, a `<id>.txt` of each case that has both, as `radmatch run_all`
    (0.2.2) takes them; what the command prints. Arguments and errors are those of `vlm3d` and of `mu2llm score`."""
    reports = _reports(predictions, run)
    cases, twice = foreign.references(references, split)
    joined = foreign.join(cases, twice, foreign.Texts(predictions, reports, {name: {} for name in reports}, [], 0))
    names = [_file_name(case.id) for case in joined.cases]
    place.clear(out, fresh)
    for name, case, report in zip(names, joined.cases, joined.reports, strict=True):
        storage.write_bytes(storage.join(out, "reports_gt", name), case.report.encode())
        storage.write_bytes(storage.join(out, "reports_pred", name), report.encode())
    place.sign(out, "radmatch", predictions=predictions, references=references)
    return {"out": out, "reports": len(names), "unmatched": joined.unmatched}


def _reports(uri: str, run: str | None) -> dict[str, str]:
    """Id → report, of any source; a UserError where an id comes twice, or a row has none."""
    if Header.there(uri):
        return _evaluated(uri, run)
    if run is not None:
        raise UserError(f"--run {run}: only a folder that evaluate wrote has runs")
    if Shards.there(uri):
        raise UserError(f"--predictions {uri}: shards hold references; give reports that a model wrote")
    found = foreign.read(uri, foreign.PREDICTIONS)
    if found.doubled:
        named = ", ".join(found.doubled[: foreign.NAMED])
        raise UserError(f"--predictions {uri} has ids that come twice: {named}; expected one report an image")
    if found.nameless:
        raise UserError(f"--predictions {uri} has {found.nameless} reports without an id; expected one of each image")
    return found.reports


def _evaluated(uri: str, run: str | None) -> dict[str, str]:
    runs = list(Header.open(uri).checkpoints)
    chosen = run or runs[-1]
    if chosen not in runs:
        raise UserError(f"--run {run}: {uri} has {', '.join(runs)}")
    table = storage.read_table(storage.join(uri, "predictions.parquet"))
    written = [Prediction.from_row(row) for row in table.to_pylist()]
    return {
        each.case_id: each.text
        for each in written
        if each.run == chosen and each.variant == "as_is" and each.region is None and each.index == 0
    }


def _file_name(identity: str) -> str:
    if "/" in identity or "\\" in identity or identity.startswith("."):
        raise UserError(f"the id {identity!r} is no file name; radmatch pairs files by name")
    return f"{identity}.txt"

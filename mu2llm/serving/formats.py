"""A report as JSON, text, FHIR DiagnosticReport or DICOM SR, by the Accept header."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from mu2llm.serving.fhir import diagnostic_report
from mu2llm.serving.problems import Problem
from mu2llm.serving.schemas import Report
from mu2llm.serving.service import Made
from mu2llm.serving.structured import structured_report

JSON, TEXT, FHIR, DICOM, EVENTS = (
    "application/json",
    "text/plain",
    "application/fhir+json",
    "application/dicom",
    "text/event-stream",
)
OFFERED = (JSON, TEXT, FHIR, DICOM, EVENTS)
OPENAPI: dict[str, Any] = {
    TEXT: {"schema": {"type": "string"}},
    FHIR: {"schema": {"type": "object", "description": "DiagnosticReport, R4B"}},
    DICOM: {"schema": {"type": "string", "format": "binary", "description": "Comprehensive SR, laid out as TID 2000"}},
}


def choose(accept: str) -> str:
    """The best of the offered media types for an Accept header; 406 where there is none."""
    wanted = []
    for place, entry in enumerate(accept.split(",")):
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = next((_number(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        if kind and quality > 0:
            wanted.append((-quality, place, kind))
    for _, _, kind in sorted(wanted):
        for offered in OFFERED:
            family = kind.endswith("/*") and offered.startswith(kind[:-1]) and offered != EVENTS
            if kind in ("*/*", offered) or family:
                return offered
    raise Problem(406, "not_acceptable", f"accept one of {', '.join(OFFERED)}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def respond(kind: str, made: Made) -> Response:
    """The report in one of the formats; an SR needs the scan's `references`."""
    report = made.report
    if kind == TEXT:
        return Response(report.report + "\n", media_type="text/plain; charset=utf-8", headers=_by_id(report))
    if kind == FHIR:
        return Response(diagnostic_report(report, made.references), media_type=FHIR, headers=_by_id(report))
    if kind == DICOM:
        assert made.references is not None
        return Response(structured_report(report, made.references), media_type=DICOM, headers=_by_id(report))
    return JSONResponse(report.model_dump(mode="json"), headers=_by_id(report))


def _by_id(report: Report) -> dict[str, str]:
    """Headers of an answer in any format."""
    unlike = {"X-Unlike-Training-Scans": "true"} if report.familiarity and report.familiarity.unlike else {}
    return {"X-Report-Id": report.id, **unlike}

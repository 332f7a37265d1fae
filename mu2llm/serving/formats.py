"""A report as JSON, text, FHIR DiagnosticReport (R4B) or DICOM Basic Text SR, by the Accept header."""

from __future__ import annotations

import base64
import io
from datetime import UTC, datetime
from typing import Any

from starlette.responses import JSONResponse, Response

from mu2llm import green
from mu2llm.serving.decoder import References
from mu2llm.serving.problems import Problem
from mu2llm.serving.schemas import Report
from mu2llm.serving.service import Made

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
    DICOM: {"schema": {"type": "string", "format": "binary", "description": "Basic Text SR, laid out as TID 2000"}},
}
MAKER = "mu2llm"
DEVICE_UID = "2.25.118059911276093527415230415207243207250"  # of this program as an observer, chosen once


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
        return Response(diagnostic_report(report), media_type=FHIR, headers=_by_id(report))
    if kind == DICOM:
        return Response(structured_report(made), media_type=DICOM, headers=_by_id(report))
    return JSONResponse(report.model_dump(mode="json"), headers=_by_id(report))


def _by_id(report: Report) -> dict[str, str]:
    """Headers of an answer in any format."""
    unlike = {"X-Unlike-Training-Scans": "true"} if report.familiarity and report.familiarity.unlike else {}
    return {"X-Report-Id": report.id, **unlike}


def diagnostic_report(report: Report) -> str:
    """FHIR R4B: preliminary, without subject: whose scan it is, only the sender knows."""
    from fhir.resources.R4B.diagnosticreport import DiagnosticReport  # a second to import, and rarely needed

    found, impression = green.parts(report.report)
    text = base64.b64encode(report.report.encode()).decode()
    resource = DiagnosticReport.model_validate(
        {
            "id": report.id,
            "meta": {"tag": [{"system": "urn:mu2llm", "code": "research", "display": report.disclaimer}]},
            "identifier": [{"system": "urn:ietf:rfc:3986", "value": f"urn:uuid:{_uuid(report.id)}"}],
            "status": "preliminary",
            "category": [{"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "CT"}]}],
            "code": {"coding": [{"system": "http://loinc.org", "code": "18747-6", "display": "CT Report"}]},
            "issued": datetime.now(UTC).isoformat(timespec="seconds"),
            "performer": [{"display": f"{MAKER} {report.model.id}"}],
            "conclusion": impression or found or "No text was generated.",
            "presentedForm": [{"contentType": "text/plain; charset=utf-8", "language": "en", "data": text}],
        }
    )
    return str(resource.model_dump_json(exclude_none=True))


def _uuid(identity: str) -> str:
    return f"{identity[:8]}-{identity[8:12]}-{identity[12:16]}-{identity[16:20]}-{identity[20:]}"


def structured_report(made: Made) -> bytes:
    """DICOM Basic Text SR by TID 2000, in the study of the scan: partial, unverified.

    Patient and study attributes are those of the images, so that an archive puts it with them. Dates and times are in
    the images' zone, else in this machine's, and name it.
    """
    assert made.references is not None
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian, generate_uid

    references = made.references
    moment = _now(references.attributes.get("TimezoneOffsetFromUTC", ""))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = BasicTextSRStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[made.report.id])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    document = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    document.SpecificCharacterSet = "ISO_IR 192"
    document.SOPClassUID, document.SOPInstanceUID = BasicTextSRStorage, meta.MediaStorageSOPInstanceUID
    for keyword, value in {**dict.fromkeys(_NEEDED, ""), **references.attributes}.items():
        document.add(_as_sent(keyword, value))
    document.TimezoneOffsetFromUTC = moment.strftime("%z")
    document.StudyInstanceUID = references.study
    document.SeriesInstanceUID = generate_uid(entropy_srcs=[made.report.id, "series"])
    document.Modality, document.SeriesNumber, document.InstanceNumber = "SR", 1, 1
    document.Manufacturer, document.SoftwareVersions = MAKER, made.report.model.id[:64]
    document.ReferencedPerformedProcedureStepSequence = []
    document.PerformedProcedureCodeSequence = []
    document.CompletionFlag, document.VerificationFlag = "PARTIAL", "UNVERIFIED"
    document.ContentDate, document.ContentTime = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")
    document.CurrentRequestedProcedureEvidenceSequence = [_evidence(references)]
    for element in _content(made.report):
        document.add(element)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, document, enforce_file_format=True)
    return buffer.getvalue()


_NEEDED = (  # though they may be empty
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber"),
)


def _now(offset: str) -> datetime:
    """Now, in the zone of an offset such as +0300; where it is none, in this machine's."""
    try:
        zone = datetime.strptime(offset.strip(), "%z").tzinfo
    except ValueError:
        zone = None
    return datetime.now(UTC).astimezone(zone)


def _as_sent(keyword: str, value: str) -> Any:
    """An attribute with a value as the images have it, which may not be as the standard wants it."""
    from pydicom.config import IGNORE
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import DataElement

    tag = tag_for_keyword(keyword)
    assert tag is not None
    return DataElement(tag, dictionary_VR(tag), value, validation_mode=IGNORE)


def _evidence(references: References) -> Any:
    """The images that were read, by their series."""
    from pydicom.dataset import Dataset

    series: dict[str, Dataset] = {}
    for name, sop_class, instance in references.instances:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
        if name not in series:
            series[name] = Dataset()
            series[name].SeriesInstanceUID, series[name].ReferencedSOPSequence = name, []
        series[name].ReferencedSOPSequence.append(item)
    study = Dataset()
    study.StudyInstanceUID, study.ReferencedSeriesSequence = references.study, list(series.values())
    return study


def _content(report: Report) -> Any:
    """The content tree of TID 2000: language, observer, and a section for findings and one for impressions."""
    from highdicom.sr import (
        CodedConcept,
        ContainerContentItem,
        ContentSequence,
        DeviceObserverIdentifyingAttributes,
        LanguageOfContentItemAndDescendants,
        ObserverContext,
        TextContentItem,
    )

    def code(value: str, scheme: str, meaning: str) -> Any:
        return CodedConcept(value, scheme, meaning)

    def section(title: tuple[str, str], element: tuple[str, str], text: str) -> Any:
        container = ContainerContentItem(code(title[0], "DCM", title[1]), relationship_type="CONTAINS")
        item = TextContentItem(code(element[0], "DCM", element[1]), text, relationship_type="CONTAINS")
        container.ContentSequence = ContentSequence([item])
        return container

    found, impression = green.parts(report.report)
    device = DeviceObserverIdentifyingAttributes(DEVICE_UID, MAKER, model_name=report.model.id)
    root = ContainerContentItem(code("18747-6", "LN", "CT Report"), template_id="2000")
    children = [
        *LanguageOfContentItemAndDescendants(code("en", "RFC5646", "English")),
        *ObserverContext(code("121007", "DCM", "Device"), device),
        section(("121070", "Findings"), ("121071", "Finding"), found or "No text was generated."),
    ]
    if impression:
        children.append(section(("121072", "Impressions"), ("121073", "Impression"), impression))
    root.ContentSequence = ContentSequence(children)
    return root

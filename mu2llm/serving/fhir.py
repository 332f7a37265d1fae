"""A report as a FHIR R4B DiagnosticReport: preliminary, with the patient and the imaging study of a DICOM scan."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Any

from mu2llm import green
from mu2llm.serving.codes import SNOMED
from mu2llm.serving.decoder import References
from mu2llm.serving.schemas import Report
from mu2llm.serving.structured import MAKER

GENDERS = {"M": "male", "F": "female", "O": "other"}
SCT = "http://snomed.info/sct"


def diagnostic_report(report: Report, references: References | None) -> str:
    """The resource as JSON. Of what is no DICOM it has no subject: whose scan it is, only the sender knows."""
    from fhir.resources.R4B.diagnosticreport import DiagnosticReport  # a second to import, and rarely needed

    found, impression = green.parts(report.report)
    text = base64.b64encode(report.report.encode()).decode()
    told = {
        "id": report.id,
        "meta": {"tag": [{"system": "urn:mu2llm", "code": "research", "display": report.disclaimer}]},
        "identifier": [{"system": "urn:ietf:rfc:3986", "value": f"urn:uuid:{_uuid(report.id)}"}],
        "status": "preliminary",
        "category": [{"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "CT"}]}],
        "code": {"coding": [{"system": "http://loinc.org", "code": "18747-6", "display": "CT Report"}]},
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "performer": [{"display": f"{MAKER} {report.model.id}"}],
        "conclusion": impression or found or "No text was generated.",
        "conclusionCode": [
            {"coding": [{"system": SCT, "code": SNOMED[name][0], "display": SNOMED[name][1]}]}
            for name in dict.fromkeys(finding.name for finding in report.findings)
            if name in SNOMED
        ],
        "presentedForm": [{"contentType": "text/plain; charset=utf-8", "language": "en", "data": text}],
        **(_of_study(references) if references else {}),
    }
    resource = DiagnosticReport.model_validate({name: value for name, value in told.items() if value})
    return str(resource.model_dump_json(exclude_none=True))


def _of_study(references: References) -> dict[str, Any]:
    """Whose report it is and of which study: contained resources, by their identifiers."""

    def sent(keyword: str) -> str:
        return str(references.header.get(keyword) or "").strip()

    patient = {
        "resourceType": "Patient",
        "id": "patient",
        "identifier": [{"type": _identifier_type("MR"), "value": sent("PatientID")}] if sent("PatientID") else [],
        "name": [{"text": sent("PatientName").replace("^", " ")}] if sent("PatientName") else [],
        "birthDate": _date(sent("PatientBirthDate")),
        "gender": GENDERS.get(sent("PatientSex"), ""),
    }
    accession = {"type": _identifier_type("ACSN"), "value": sent("AccessionNumber")}
    study = {
        "resourceType": "ImagingStudy",
        "id": "study",
        "identifier": [
            {"system": "urn:dicom:uid", "value": f"urn:oid:{references.study}"},
            *([accession] if accession["value"] else []),
        ],
        "status": "available",
        "subject": {"reference": "#patient"},
        "series": [
            {"uid": uid, "modality": {"system": "http://dicom.nema.org/resources/ontology/DCM", "code": "CT"}}
            for uid in dict.fromkeys(series for series, *_ in references.instances)
        ],
    }
    return {
        "contained": [{name: value for name, value in each.items() if value} for each in (patient, study)],
        "subject": {"reference": "#patient"},
        "imagingStudy": [{"reference": "#study"}],
        **({"basedOn": [{"type": "ServiceRequest", "identifier": accession}]} if accession["value"] else {}),
    }


def _date(sent: str) -> str:
    """A DICOM date as FHIR writes it; nothing where it is none."""
    try:
        return datetime.strptime(sent, "%Y%m%d").date().isoformat()
    except ValueError:
        return ""


def _identifier_type(code: str) -> dict[str, Any]:
    return {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": code}]}


def _uuid(identity: str) -> str:
    return f"{identity[:8]}-{identity[8:12]}-{identity[12:16]}-{identity[16:20]}-{identity[20:]}"

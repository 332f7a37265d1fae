"""A report as a DICOM Comprehensive SR in the study of the scan, laid out as TID 2000: preliminary, unverified."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, generate_uid

from mu2llm import green
from mu2llm.serving.codes import SIDES, SNOMED
from mu2llm.serving.decoder import References
from mu2llm.serving.schemas import FindingOut, Report

MAKER = "mu2llm"
DESCRIPTION = "Draft report, research use; unverified"
DEVICE_UID = "2.25.118059911276093527415230415207243207250"  # of this program as an observer, chosen once
_NEEDED = (  # though they may be empty
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber"),
)


def structured_report(report: Report, references: References) -> bytes:
    """The SR as a DICOM file.

    Patient and study attributes are those of the images, as they were sent, so that an archive puts it with them. Dates
    and times are in the images' zone, else in this machine's, and name it. The images are the evidence, the model is
    the observer.
    """
    from highdicom.sr import ComprehensiveSR  # a second to import, and rarely needed

    with pydicom.config.disable_value_validation():  # what is not as it should be is passed on, and told to nobody
        moment = _now(str(references.header.get("TimezoneOffsetFromUTC", "")))
        document = ComprehensiveSR(
            evidence=_evidence(references),
            content=_content(report),
            series_instance_uid=generate_uid(entropy_srcs=[report.id, "series"]),
            series_number=1,
            series_description=DESCRIPTION,
            sop_instance_uid=generate_uid(entropy_srcs=[report.id]),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=report.model.id[:64],
            software_versions=report.model.id[:64],
            device_serial_number=report.model.checkpoint[:64],
            content_date=moment.date(),
            content_time=moment.time().replace(microsecond=0),
            specific_character_set="ISO_IR 192",
        )
        document.TimezoneOffsetFromUTC = moment.strftime("%z")
        document.InstanceCreationDate, document.InstanceCreationTime = document.ContentDate, document.ContentTime
        header = pydicom.Dataset(references.header)
        header.SOPClassUID = CTImageStorage  # whose modules of patient and study are those of all images
        document.copy_patient_and_study_information(header)
        document.StudyInstanceUID = references.study
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, document, enforce_file_format=True)
    return buffer.getvalue()


def _now(offset: str) -> datetime:
    """Now, in the zone of an offset such as +0300; where it is none, in this machine's."""
    try:
        zone = datetime.strptime(offset.strip(), "%z").tzinfo
    except ValueError:
        zone = None
    return datetime.now(UTC).astimezone(zone)


def _evidence(references: References) -> list[Dataset]:
    """The images that were read, by their UIDs alone."""
    found = []
    for series, sop_class, instance in references.instances:
        image = Dataset()
        image.StudyInstanceUID, image.SeriesInstanceUID = references.study, series
        image.SOPClassUID, image.SOPInstanceUID = sop_class, instance
        found.append(image)
    for keyword in _NEEDED:
        setattr(found[0], keyword, "")
    return found


def _content(report: Report) -> Any:
    """The content tree: language, observer, what this is, a section for findings and one for impressions."""
    from highdicom.sr import (
        ContainerContentItem,
        ContentSequence,
        DeviceObserverIdentifyingAttributes,
        LanguageOfContentItemAndDescendants,
        ObserverContext,
    )

    found, impression = green.parts(report.report)
    device = DeviceObserverIdentifyingAttributes(
        DEVICE_UID, MAKER, MAKER, model_name=report.model.id, serial_number=report.model.checkpoint
    )
    coded = [_finding(each) for each in report.findings if each.name in SNOMED]
    root = ContainerContentItem(_code("18747-6", "LN", "CT Report"), template_id="2000")
    children = [
        *LanguageOfContentItemAndDescendants(_code("en", "RFC5646", "English")),
        *ObserverContext(_code("121007", "DCM", "Device"), device),
        _text("121106", "Comment", f"{DESCRIPTION}. {report.disclaimer}"),
        _section("121070", "Findings", [_text("121071", "Finding", found or "No text was generated."), *coded]),
    ]
    if impression:
        children.append(_section("121072", "Impressions", [_text("121073", "Impression", impression)]))
    root.ContentSequence = ContentSequence(children)
    return root


def _section(value: str, meaning: str, items: Sequence[Any]) -> Any:
    from highdicom.sr import ContainerContentItem, ContentSequence

    container = ContainerContentItem(_code(value, "DCM", meaning), relationship_type="CONTAINS")
    container.ContentSequence = ContentSequence(items)
    return container


def _text(value: str, meaning: str, text: str) -> Any:
    from highdicom.sr import TextContentItem

    return TextContentItem(_code(value, "DCM", meaning), text, relationship_type="CONTAINS")


def _finding(finding: FindingOut) -> Any:
    """A coded finding, with its side and its longest diameter where the report names them."""
    from highdicom.sr import CodeContentItem, ContentSequence, NumContentItem

    value, meaning = SNOMED[finding.name]
    item = CodeContentItem(
        _code("121071", "DCM", "Finding"), _code(value, "SCT", meaning), relationship_type="CONTAINS"
    )
    details: list[Any] = []
    if finding.side in SIDES:
        side, name = SIDES[finding.side]
        laterality = _code("272741003", "SCT", "Laterality")
        details.append(CodeContentItem(laterality, _code(side, "SCT", name), relationship_type="HAS CONCEPT MOD"))
    if finding.size_mm is not None:
        diameter, mm = _code("81827009", "SCT", "Diameter"), _code("mm", "UCUM", "millimeter")
        details.append(NumContentItem(diameter, finding.size_mm, mm, relationship_type="HAS PROPERTIES"))
    if details:
        item.ContentSequence = ContentSequence(details)
    return item


def _code(value: str, scheme: str, meaning: str) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(value, scheme, meaning)

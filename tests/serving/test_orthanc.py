"""An archive as a peer: Orthanc gets a CT, the service reads it there by DICOMweb, and its report goes back."""

import asyncio
import io
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import httpx
import pydicom
import pytest
from small_service import PATIENT_ID, STUDY, free_port, wait_for
from test_parts import WRITTEN, Handle, known

from mu2llm import config
from mu2llm.errors import Rejection
from mu2llm.serving import dicomweb, fetcher, web
from mu2llm.serving.decoder import Decoder, read
from mu2llm.serving.decoder import Reading as Asked
from mu2llm.serving.fetcher import Fetch
from mu2llm.serving.jobs import Jobs
from mu2llm.serving.keys import Doorkeeper
from mu2llm.serving.problems import Problem
from mu2llm.settings.serving import ServingConfig

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
ACCESSION = "A-2507"


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    """The URL of an empty archive."""
    binary = shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if not binary or not PLUGIN.exists():
        pytest.skip("Orthanc is not installed (apt-get install orthanc orthanc-dicomweb)")
    folder, port = tmp_path_factory.mktemp("orthanc"), free_port()
    settings = {
        **{"Name": "archive", "HttpPort": port, "DicomServerEnabled": False, "RemoteAccessAllowed": False},
        **{"StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "Plugins": [str(PLUGIN)]},
        **{"AuthenticationEnabled": False, "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen([binary, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(url, running, folder / "log"), "Orthanc")
        yield url
    finally:
        running.terminate()
        running.wait()


def answers(url, running, log):
    assert running.poll() is None, log.read_text()
    try:
        return httpx.get(f"{url}/system").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def archive(orthanc, dicom):
    """A client of the archive's DICOMweb, with one CT study in it and a small scout beside."""
    from dicomweb_client import DICOMwebClient

    client = DICOMwebClient(f"{orthanc}/dicom-web")
    images = [pydicom.dcmread(io.BytesIO(data)) for data in dicom]
    for image in images:
        image.AccessionNumber, image.StudyDescription, image.PatientBirthDate = ACCESSION, "Chest CT", "19600101"
        image.PatientName, image.SpecificCharacterSet = "Müller^Jörg", "ISO_IR 100"
    scout = pydicom.dcmread(io.BytesIO(dicom[0]))
    scout.AccessionNumber, scout.SeriesInstanceUID, scout.SOPInstanceUID = ACCESSION, f"{STUDY}.9", f"{STUDY}.9.1"
    scout.file_meta.MediaStorageSOPInstanceUID = scout.SOPInstanceUID
    client.store_instances([*images, scout])
    return client


class Reading:
    """A reader's handle: its process, without Ray."""

    def __init__(self, decoder):
        self.read, self.decoder = self, decoder

    def remote(self, reading):
        return asyncio.ensure_future(self.decoder.read(reading))


@pytest.fixture(scope="module")
def ask(orthanc, tmp_path_factory):
    """Posts to the application of a service that may read from the archive."""
    folder = tmp_path_factory.mktemp("archive")
    decoder = Decoder(60, 4 * 2**30, 500)

    def post(body, accept="application/json"):
        settings = ServingConfig(state=str(folder), dicomweb=(f"{orthanc}/dicom-web",))
        service = known(folder, Handle(WRITTEN), Reading(decoder), settings)
        app = web.application(service, Jobs(service), Doorkeeper(str(folder), needed=False), loopback=False)

        async def go():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
                return await client.post("/v1/reports", json=body, headers={"accept": accept})

        return asyncio.run(go())

    yield post
    decoder.close()


def test_a_report_comes_back_into_its_study(orthanc, archive, ask, dicom):
    """It was said to open a second study, of a patient without an identity."""
    answer = ask({"study": f"{orthanc}/dicom-web/studies/{STUDY}"}, "application/dicom")
    assert answer.status_code == 200, answer.text
    document = pydicom.dcmread(io.BytesIO(answer.content))
    evidence = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert len(evidence.ReferencedSOPSequence) == len(dicom)  # the CT's, not the scout's
    archive.store_instances([document])
    counts = httpx.get(f"{orthanc}/statistics").json()
    assert (counts["CountPatients"], counts["CountStudies"], counts["CountSeries"]) == (1, 1, 3)
    (study,) = archive.search_for_studies(search_filters={"AccessionNumber": ACCESSION})
    assert study["0020000D"]["Value"] == [STUDY]
    series = archive.search_for_series(STUDY)
    assert sorted(each["00080060"]["Value"][0] for each in series) == ["CT", "CT", "SR"]
    kept = archive.retrieve_instance(STUDY, document.SeriesInstanceUID, document.SOPInstanceUID)
    assert (kept.PatientID, str(kept.PatientName), kept.StudyDescription) == (PATIENT_ID, "Müller^Jörg", "Chest CT")
    assert (kept.AccessionNumber, kept.PatientBirthDate) == (ACCESSION, "19600101")


def test_a_series_is_named_and_fhir_says_whose_it_is(orthanc, archive, ask, dicom):
    series = pydicom.dcmread(io.BytesIO(dicom[0])).SeriesInstanceUID
    body = {"study": f"{orthanc}/dicom-web/studies/{STUDY}/series/{series}"}
    told = ask(body, "application/fhir+json").json()
    assert told["contained"][0]["identifier"][0]["value"] == PATIENT_ID
    assert told["contained"][1]["identifier"][0]["value"] == f"urn:oid:{STUDY}"
    answer = ask(body).json()
    assert answer["scan"]["format"] == "DICOM" and PATIENT_ID not in json.dumps(answer)


def test_a_study_gives_as_many_series_as_the_model_takes(orthanc, archive, dicom, tmp_path):
    """The largest alone was read, and the others went without a word but the warning."""
    study, counts = f"{STUDY}.2", {}
    for name, most in {"1": len(dicom), "2": len(dicom) - 2, "3": 2}.items():
        images = [pydicom.dcmread(io.BytesIO(data)) for data in dicom[:most]]
        for number, image in enumerate(images):
            image.StudyInstanceUID, image.SeriesInstanceUID = study, f"{study}.{name}"
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"{study}.{name}.{number}"
        archive.store_instances(images)
        counts[f"{study}.{name}"] = most
    uri = f"{orthanc}/dicom-web/studies/{study}"
    for series in (1, 2, 3, 4):
        files = dicomweb.fetch(uri, len(dicom), series)
        found = Counter(pydicom.dcmread(io.BytesIO(data)).SeriesInstanceUID for data in files)
        assert found == dict(list(counts.items())[:series])
    of_two = config.load("tiny", ["data.spec.series=2"]).data.spec
    copy = fetcher.fetch(Fetch(uri, str(tmp_path), of_two.series), 200)
    scan = read(Asked(copy, of_two, references=True), 200)
    assert scan.facts["series"] == 2 and len(scan.references.instances) == 2 * len(dicom) - 2
    with pytest.raises(Rejection, match=f"more than {len(dicom) - 1} images"):
        dicomweb.fetch(uri, len(dicom) - 1, 2)


def test_studies_that_are_not_there(orthanc, archive, ask):
    missing = ask({"study": f"{orthanc}/dicom-web/studies/1.2.3"})
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")


def test_an_archive_that_is_down(ask, orthanc, monkeypatch):
    port = free_port()
    monkeypatch.setattr(dicomweb, "allowed", lambda uri, _: uri)
    down = ask({"study": f"http://127.0.0.1:{port}/dicom-web/studies/1.2.3"})
    assert (down.status_code, down.json()["code"]) == (503, "storage")


@pytest.mark.parametrize(
    "uri",
    [
        *("http://evil.example/dicom-web/studies/1.2", "https://pacs/dicom-web/studies/1.2"),
        *("http://pacs/dicom-web/studies/1.2?x=1", "http://pacs/dicom-web/studies/../x", "http://pacs/dicom-web"),
        *("http://pacs/dicom-web/studies/1.2/instances", "http://pacs@evil/dicom-web/studies/1.2"),
        *("http://pacs/dicom-web-of-others/studies/1.2", "http://pacs/dicom-web/studies/1.2#", "http://pacs/"),
    ],
)
def test_other_places_are_refused_alike(uri):
    with pytest.raises(Problem) as told:
        dicomweb.allowed(uri, ["http://pacs/dicom-web/"])
    assert told.value.code == "uri_not_allowed"
    assert dicomweb.allowed("http://pacs/dicom-web/studies/1.2/series/3.4", ["http://pacs/dicom-web/"])

"""Reports over HTTP: forms, JSON, formats, streams, chat."""

import base64
import io
import json
import zipfile

import httpx
import nibabel as nib
import numpy as np
import pydicom
import pytest
from ct_scans import metaimage, nrrd
from small_service import GUARD_S, PATIENT, PATIENT_ID, PLAIN, STUDY, wait_for
from small_writer import FIRST, QUESTION

from mu2llm import ct
from mu2llm.ct.phantom import make as make_phantom

pytestmark = pytest.mark.slow


def post(client, scan, headers=None, name="scan.nii.gz", **fields):
    return client.post("/v1/reports", files={"scan": (name, scan)}, data=fields, headers=headers or {})


def events(response):
    """[(event, data)] of a server-sent stream."""
    found = []
    for block in response.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        found.append(
            (lines.get("event", ""), lines["data"] if lines["data"] == "[DONE]" else json.loads(lines["data"]))
        )
    return found


def zipped(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number, data in enumerate(files):
            archive.writestr(f"series/{number:03d}.dcm", data)
    return stream.getvalue()


def test_an_uploaded_scan_gets_a_report(client, phantom):
    answer = post(client, phantom)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["report"] == FIRST
    assert told["findings"] == [{"name": "pleural effusion", "side": "left", "place": None, "size_mm": None}]
    assert told["spec"]["name"] == "least" and told["question"] == QUESTION and told["finished"]
    assert len(told["scan"]["sha256"]) == 64 and told["scan"]["format"] == "NIfTI"
    assert set(told["seconds"]) == {"read", "queue", "encode", "write", "total"}
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_dicom_series_is_the_same_scan_as_a_zip_or_as_files(client, dicom):
    whole = post(client, zipped(dicom), name="series.zip").json()
    parts = client.post("/v1/reports", files=[("scan", (f"{n}.dcm", data)) for n, data in enumerate(dicom)]).json()
    assert whole["scan"] == parts["scan"] and whole["scan"]["format"] == "DICOM"


def test_a_single_slice_is_a_422_that_says_so(client, dicom):
    answer = post(client, dicom[0], name="one.dcm")
    assert answer.status_code == 422 and answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "single_slice" and "one slice" in answer.json()["detail"]


def test_a_scan_is_named_by_its_uri(client, phantom, places):
    for name in ("scan", "my scan", "100%", "a+b", "ünï"):
        (places / "allowed" / f"{name}.nii.gz").write_bytes(phantom)
        for uri in (f"file://{places}/allowed/{name}.nii.gz", f"{places}/allowed/{name}.nii.gz"):
            answer = client.post("/v1/reports", json={"uri": uri, "max_new_tokens": 5})
            assert answer.status_code == 200, (uri, answer.text)
            assert FIRST.startswith(answer.json()["report"]) and not answer.json()["finished"]
    missing = client.post("/v1/reports", json={"uri": f"file://{places}/allowed/none.nii.gz"})
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")


def test_other_formats_of_a_scan_are_the_same_scan(client, phantom):
    volume = ct.read(phantom)
    expected = post(client, phantom).json()["scan"]["sha256"]
    for name, make in (("scan.mha", metaimage), ("scan.nrrd", nrrd)):
        answer = post(client, make(volume.hu, volume.affine, compress=True), name=name)
        assert (answer.status_code, answer.json()["scan"]["sha256"]) == (200, expected)
    climbing = post(client, metaimage(volume.hu, ElementDataFile="../scan.raw"), name="scan.mhd")
    assert (climbing.status_code, climbing.json()["code"]) == (400, "unsafe_archive")


def test_a_region_is_asked_for(client, phantom):
    answer = post(client, phantom, region="chest", max_new_tokens=3).json()
    assert answer["question"] == "Describe the findings in the chest."
    assert post(client, phantom, question="Any nodule?", max_new_tokens=3).json()["question"] == "Any nodule?"


def test_what_is_sampled_can_be_drawn_again(client, phantom):
    drawn = [post(client, phantom, temperature=3, seed=seed, max_new_tokens=8).json()["report"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_text(client, phantom):
    answer = post(client, phantom, {"accept": "text/plain"})
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text == FIRST + "\n" and answer.headers["x-report-id"]


def test_fhir(client, phantom):
    from fhir.resources.R4B.diagnosticreport import DiagnosticReport

    answer = post(client, phantom, {"accept": "application/fhir+json"})
    assert answer.headers["content-type"] == "application/fhir+json"
    resource = DiagnosticReport.model_validate_json(answer.content)
    assert resource.conclusion == "Left pleural effusion." and resource.status == "preliminary"
    assert resource.subject is None
    assert base64.b64decode(json.loads(answer.content)["presentedForm"][0]["data"]).decode() == FIRST


def test_dicom_in_gives_a_structured_report_of_that_study(client, dicom):
    answer = post(client, zipped(dicom), {"accept": "application/dicom"}, name="series.zip")
    assert answer.status_code == 200, answer.text
    document = pydicom.dcmread(io.BytesIO(answer.content))
    assert document.SOPClassUID == pydicom.uid.ComprehensiveSRStorage and document.StudyInstanceUID == STUDY
    assert document.ContentTemplateSequence[0].TemplateIdentifier == "2000"
    titles = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in document.ContentSequence}
    assert titles["Findings"].ContentSequence[0].TextValue.startswith("There is a large left")
    assert titles["Impressions"].ContentSequence[0].TextValue == "Left pleural effusion."
    evidence = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    instances = {pydicom.dcmread(io.BytesIO(data)).SOPInstanceUID for data in dicom}
    assert {item.ReferencedSOPInstanceUID for item in evidence.ReferencedSOPSequence} == instances
    assert (document.PatientName, document.PatientID) == (PATIENT, PATIENT_ID) and document.TimezoneOffsetFromUTC


def test_dicom_named_by_its_uri_gives_a_structured_report_too(client, dicom, places):
    (places / "allowed" / "series").mkdir()
    for number, data in enumerate(dicom):
        (places / "allowed" / "series" / f"{number:03d}.dcm").write_bytes(data)
    asked = {"uri": f"file://{places}/allowed/series", "max_new_tokens": 5}
    answer = client.post("/v1/reports", json=asked, headers={"accept": "application/dicom"})
    assert answer.status_code == 200, answer.text
    document = pydicom.dcmread(io.BytesIO(answer.content))
    evidence = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert len(evidence.ReferencedSOPSequence) == len(dicom)


def test_no_structured_report_without_dicom(client, phantom):
    answer = post(client, phantom, {"accept": "application/dicom"})
    assert (answer.status_code, answer.json()["code"]) == (406, "not_dicom")


def test_formats_that_are_not_offered(client, phantom):
    assert post(client, phantom, {"accept": "application/pdf"}).status_code == 406
    assert client.post("/v1/reports", content=b"x", headers={"content-type": "text/csv"}).status_code == 415


def test_a_report_streams_in(client, phantom):
    answer = post(client, phantom, stream="true")
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer)
    assert told[0][0] == "scan" and told[-1][0] == "report"
    pieces = [data["text"] for name, data in told if name == "token"]
    assert "".join(pieces) == FIRST == told[-1][1]["report"]
    plain = post(client, phantom).json()
    assert {**plain, "id": 0, "seconds": 0} == {**told[-1][1], "id": 0, "seconds": 0}


def test_what_a_draft_depended_on_lies_over_its_scan(client, phantom):
    """Asked for behind the report, of a scan that was sent once."""
    sent = client.post("/v1/scans", files={"scan": ("a.nii.gz", phantom)}).json()["id"]
    draft = client.post("/v1/reports", json={"scan": sent}).json()
    answer = client.post(f"/v1/drafts/{draft['id']}/influence", json={"scan": sent})
    assert answer.status_code == 200, answer.text
    sentences = answer.json()["sentences"]
    assert [s["text"] for s in sentences] == [draft["report"][s["start"] : s["end"]] for s in sentences]
    assert len(sentences) == 4
    scan = nib.Nifti1Image.from_bytes(__import__("gzip").decompress(phantom))
    low, high = bounds(scan.affine, scan.shape)
    for sentence in sentences:
        assert sentence["nifti"] is None or sentence["drop"] > sentence["random"]
        if sentence["nifti"]:
            image = nib.Nifti1Image.from_bytes(base64.b64decode(sentence["nifti"]))
            values = np.asarray(image.dataobj)
            assert values.dtype == np.uint8 and values.max() == 255 and values.shape == (16, 16, 8)
            inside_low, inside_high = bounds(image.affine, image.shape)
            assert (inside_low >= low - 1).all() and (inside_high <= high + 1).all()
    other = client.post("/v1/scans", files={"scan": ("a.nii.gz", make_phantom(3, 2).nifti())}).json()["id"]
    wrong = client.post(f"/v1/drafts/{draft['id']}/influence", json={"scan": other})
    assert (wrong.status_code, wrong.json()["code"]) == (409, "another_scan")


def bounds(affine, shape):
    """The scan's box in mm, by its voxels' outer faces."""
    corners = np.array(np.meshgrid(*[(-0.5, size - 0.5) for size in shape])).reshape(3, -1)
    places = affine[:3, :3] @ corners + affine[:3, 3:]
    return places.min(axis=1), places.max(axis=1)


def test_a_bad_scan_is_told_before_a_stream_begins(client, dicom):
    answer = post(client, dicom[0], name="one.dcm", stream="true")
    assert (answer.status_code, answer.json()["code"]) == (422, "single_slice")


def test_questions_that_are_too_long_or_spell_out_special_tokens(client, phantom):
    for question in ("word " * 700, "<volume><volume>"):
        answer = post(client, phantom, question=question)
        assert (answer.status_code, answer.json()["code"]) == (422, "too_long")


def test_clients_that_leave_give_their_places_back(client, phantom, service):
    """There are 16 (serving.max_queued_requests), and whoever finds none gets a 429."""
    form = {"files": {"scan": ("a.nii.gz", phantom)}, "data": {"stream": "true"}}
    for _ in range(17):
        with (
            httpx.Client(base_url=service, verify=PLAIN, timeout=GUARD_S) as leaving,
            leaving.stream("POST", "/v1/reports", **form) as answer,
        ):
            assert answer.status_code in (200, 429)
    wait_for(lambda: post(client, phantom).status_code == 200)


def test_samples(client):
    listed = client.get("/v1/samples").json()
    assert len(listed) >= 3 and set(listed[0]) >= {"id", "name", "description"}
    scan = client.get(f"/v1/samples/{listed[0]['id']}")
    assert scan.content == client.get(f"/v1/samples/{listed[0]['id']}").content
    assert post(client, scan.content).status_code == 200
    assert client.get("/v1/samples/none").status_code == 404


def test_pages_without_a_network(client):
    assert client.get("/").status_code == 200
    docs = client.get("/docs").text
    assert "http:" not in docs and "https:" not in docs
    assert client.get("/docs/assets/swagger-ui-bundle.js").status_code == 200
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) >= {"/v1/reports", "/v1/jobs", "/v1/green", "/v1/chat/completions", "/v1/corrections"}


@pytest.fixture(scope="module")
def items(shared):
    """Every scan of the shared folder, as one would post it: a file, or a folder's files in a zip."""
    root = shared / "data" / "ct"
    folders = {
        *("totalseg_dicom", "dcm_qa_ct_GE", "monai_CT_DICOM", "lungmask_dicom", "dcmqi_ct3slice"),
        "ibsi/ibsi_1_ct_radiomics_phantom/dicom/image",
        *(f"rt-utils/{name}" for name in ("mock_data", "one_slice_data", "oriented_data")),
    }
    found = {}
    for name in sorted(folders):
        files = sorted(path for path in (root / name).rglob("*") if path.is_file())
        found[f"{name}.zip"] = zipped([path.read_bytes() for path in files])
    for path in sorted(root.rglob("*")):
        relative = str(path.relative_to(root))
        if path.is_file() and not any(relative.startswith(f"{name}/") for name in folders):
            found[relative] = path.read_bytes()
    return found


def test_every_shared_scan_ends_in_a_report_or_a_documented_refusal(client, items):
    ends = {}
    for name, data in items.items():
        answer = post(client, data, name=name.rsplit("/", 1)[-1], max_new_tokens=2)
        ends[name] = answer.status_code if answer.status_code == 200 else (answer.status_code, answer.json()["code"])
        assert answer.status_code == 200 or answer.headers["content-type"] == "application/problem+json"
    assert all(end == 200 or end[0] in (400, 413, 415, 422) for end in ends.values()), ends
    assert ends["totalseg/example_ct.nii.gz"] == ends["dcm_qa_ct_GE.zip"] == 200
    assert ends["rt-utils/one_slice_data.zip"] == (422, "single_slice")
    assert ends["totalseg/NEGATIVE_example_mr_sm.nii.gz"] == (422, "not_hu")
    assert ends["monai_CT_DICOM.zip"] == (422, "slice_gap")
    assert sum(end == 200 for end in ends.values()) >= 12

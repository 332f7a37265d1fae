"""The parts that need neither Ray nor HTTP: batches, media types, stored things, the Serve config."""

import asyncio
import dataclasses
import hashlib
import io
import json
import os
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest
import yaml
from ct_scans import SERIES, chest, slices, to_bytes
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydicom.sr._concepts_dict import concepts
from ray.exceptions import RayActorError

from mu2llm import config, storage
from mu2llm.ct import ACCEPTABLE
from mu2llm.engine.sampling import Decoding
from mu2llm.errors import Rejection
from mu2llm.green.lexicon import lexicon
from mu2llm.serving import formats, web
from mu2llm.serving.app import Settings, deployments, serve_config
from mu2llm.serving.chat import ChatRequest
from mu2llm.serving.codes import SIDES, SNOMED
from mu2llm.serving.decoder import Reading, References, Scan, read
from mu2llm.serving.exchange import Status, Written
from mu2llm.serving.fhir import diagnostic_report
from mu2llm.serving.jobs import Jobs
from mu2llm.serving.problems import Problem, rejected
from mu2llm.serving.queue import QueuedRequest, RequestQueue
from mu2llm.serving.refusal import Refusal
from mu2llm.serving.schemas import CorrectionIn, Job, PairIn, Report, ReportOptions
from mu2llm.serving.scorer import GreenScorer
from mu2llm.serving.service import Service, Upload
from mu2llm.serving.stop import before_stop, without_begun_stop
from mu2llm.serving.store import Store, StoredJob, now
from mu2llm.serving.structured import structured_report
from mu2llm.settings.serving import ServingConfig


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        *(("*/*", formats.JSON), ("application/json", formats.JSON), ("text/plain", formats.TEXT)),
        *(("text/html,text/*;q=0.5", formats.TEXT), ("application/fhir+json, */*;q=0.1", formats.FHIR)),
        *(("application/dicom;q=0.2, application/json;q=0.9", formats.JSON), ("text/event-stream", formats.EVENTS)),
        ("text/plain;q=0, application/*", formats.JSON),
    ],
)
def test_the_best_format_that_is_accepted(accept, chosen):
    assert formats.choose(accept) == chosen


@pytest.mark.parametrize("accept", ["image/png", "", "text/plain;q=0", "*/*;q=nonsense"])
def test_no_format_that_is_accepted(accept):
    with pytest.raises(Problem) as told:
        formats.choose(accept)
    assert told.value.status == 406


def test_rows_are_taken_in_the_order_of_their_arrival_and_who_leaves_is_not():
    async def go():
        waiting = RequestQueue()
        rows = [waiting.add(QueuedRequest(name, Decoding(5))) for name in "abcd"]
        waiting.leave(rows[1])
        await asyncio.wait_for(waiting.arrival(), 5)
        first, second = waiting.take(2), waiting.take(9)
        return [[row.request for row in taken] for taken in (first, second, waiting.take(1))], rows[1].abandoned

    assert asyncio.run(go()) == ([["a", "c"], ["d"], []], True)


def test_nobody_waits_in_vain():
    async def go():
        waiting = RequestQueue()
        arrival = asyncio.create_task(waiting.arrival())
        await asyncio.sleep(0.01)
        early = arrival.done()
        waiting.add(QueuedRequest("a", Decoding(5)))
        await asyncio.wait_for(arrival, 5)
        return early

    assert not asyncio.run(go())


def test_pieces_of_a_text_come_while_it_is_written():
    async def go():
        row = QueuedRequest("x", Decoding(5), streamed=True)

        def write():
            for piece in ("one ", "two ", "three"):
                row.send(piece)
                time.sleep(0.02)
            row.finish("end")

        writing = asyncio.to_thread(write)
        task = asyncio.create_task(writing)
        pieces = [piece async for piece in row.pieces()]
        await task
        return pieces, await row.done

    pieces, end = asyncio.run(go())
    assert "".join(pieces) == "one two three" and len(pieces) > 1 and end == "end"


def test_ids_that_are_no_ids_find_nothing(tmp_path):
    store = Store(str(tmp_path), None, 1)
    (tmp_path / "secret.json").write_text("{}")
    for identity in ("../secret", "x", "0" * 32):
        with pytest.raises(Problem) as told:
            store.report(identity)
        assert told.value.status == 404


def test_uploads_are_kept_by_choice_only(tmp_path):
    assert Store(str(tmp_path / "s"), None, 1).keep_scan([b"x"]) is None
    uri = Store(str(tmp_path / "s"), str(tmp_path / "kept"), 1).keep_scan([b"\x1f\x8bscan"])
    assert uri.endswith(".nii.gz") and Path(uri).read_bytes() == b"\x1f\x8bscan"
    for data, suffix in ((b"NRRD0004\n", ".nrrd"), (b"ObjectType = Image\n", ".mha"), (b"PK\x03\x04", ".zip")):
        assert str(Store(str(tmp_path / "s"), str(tmp_path / "kept"), 1).keep_scan([data])).endswith(suffix)


@pytest.mark.parametrize("preset", ["demo", "paper"])
def test_the_serve_config_is_of_the_same_application(preset):
    from ray.serve.schema import ServeDeploySchema

    experiment = config.load(preset)
    settings = Settings(tracking="http://mlflow:5000", serving=experiment.serving, judge=experiment.judge)
    told = yaml.safe_load(yaml.safe_dump(serve_config(settings)))
    checked = ServeDeploySchema.model_validate(told)
    (application,) = checked.applications
    assert not application.deployments  # what each is given follows from the arguments, and stands nowhere else
    assert application.import_path == "mu2llm.serving.app:build"
    assert Settings.model_validate(application.args) == settings.model_copy(update={"loopback": False})
    made = deployments(Settings.model_validate(application.args))
    gpus = {name: each.ray_actor_options["num_gpus"] for name, each in made.items()}
    assert gpus["ReportGenerator"] == experiment.serving.generator.gpus
    assert gpus["Ingress"] == gpus["VolumeReader"] == 0


def test_a_deployment_of_gpus_scales_to_zero_where_it_may():
    scorer = deployments(Settings(tracking="x", serving=config.load("paper").serving))["GreenScorer"]
    assert scorer._deployment_config.autoscaling_config.min_replicas == 0


class Streams:
    """A generator's handle with these streams, one after the other."""

    def __init__(self, *streams):
        self.left, self.asked = iter(streams), 0

    def options(self, **_):
        return self

    @property
    def stream(self):
        return self

    def remote(self, _):
        self.asked += 1
        return next(self.left)


class FakeStream:
    """Brings pieces; with `breaks_after` it breaks there, as when the replica dies."""

    def __init__(self, pieces, breaks_after=None):
        self.left, self.breaks_after = iter(enumerate(pieces)), breaks_after

    async def __anext__(self):
        number, piece = next(self.left)
        if number == self.breaks_after:
            raise RayActorError
        return piece

    def cancel(self):
        pass


def test_a_stream_goes_on_where_a_dead_replica_left_it():
    written = Written("one two three", "?", 3, True, {}, {}, 1, False, {}, "")
    pieces = ["one ", "two ", "three", written]
    generator = Streams(FakeStream(pieces, breaks_after=2), FakeStream(pieces))
    service = Service(None, generator, None, ServingConfig())

    async def go():
        return [piece async for piece in service.generator.stream("request", 0, float("inf"))]

    pieces = asyncio.run(go())
    assert "".join(pieces[:-1]) == "one two three" and pieces[-1] is written
    assert generator.asked == 2


def test_more_than_is_taken_on_is_refused_with_a_time_to_wait():
    service = Service(None, None, None, ServingConfig(max_queued_requests=1, max_body_mb=1))
    with pytest.raises(Problem) as told, service.admitted():
        pass
    assert told.value.status == 503
    service.status = Status(True)
    with service.admitted(), pytest.raises(Problem) as told, service.admitted():
        pass
    assert told.value.status == 429 and told.value.retry_after >= 1
    with service.admitted():
        pass


def test_a_text_ends_before_its_stop_sequence():
    assert before_stop("one two three", ("three", "two")) == ("one ", True)
    assert before_stop("one", ("two",)) == ("one", False) == before_stop("one", ())


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@hypothesis_settings(derandomize=True)
def test_nothing_is_sent_that_a_stop_sequence_takes_back(text, stop):
    """Character by character, as a stream hears it."""
    sent = ""
    for length in range(len(text) + 1):
        now, stopped = before_stop(text[:length], stop)
        if stopped:
            break
        now = without_begun_stop(now, stop)
        assert now.startswith(sent)
        sent = now
    assert before_stop(text, stop)[0].startswith(sent)


def test_null_is_as_absent():
    plain = {"messages": [{"role": "user", "content": "What is seen?"}]}
    nulls = dict.fromkeys(set(ChatRequest.model_fields) - {"messages"})
    assert ChatRequest.model_validate({**plain, **nulls}) == ChatRequest.model_validate(plain)
    said = {"role": "assistant", "content": None, "refusal": None}
    assert ChatRequest.model_validate({"messages": [said]}).messages[0].text == ""


@pytest.mark.parametrize(("stop", "taken"), [("x", ("x",)), (["x", "y"], ("x", "y")), ([], ()), (None, ())])
def test_stop_sequences_of_openai(stop, taken):
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "?"}], "stop": stop})
    assert request.options().stop == taken


@pytest.mark.parametrize("edited", ["", "  ", "\n\u2028", "\u200b", "."])
def test_a_blank_correction_is_refused(edited):
    with pytest.raises(ValueError, match="blank"):
        CorrectionIn(edited=edited, id="0" * 32)


def test_the_form_takes_what_json_takes():
    """The codes to accept were listed twice, and one was missing."""
    fields = web._FORM["properties"]
    assert set(fields) == {"scan", *ReportOptions.model_fields}
    assert tuple(fields["accept"]["items"]["enum"]) == ACCEPTABLE
    assert ReportOptions(accept=ACCEPTABLE).accept == ACCEPTABLE


@pytest.mark.parametrize("code", ACCEPTABLE)
def test_a_refusal_says_what_lets_the_scan_in(code):
    told = rejected(Rejection("", code, "5 of 7")).body()
    assert told["acceptable"] and f"accept={code}" in told["detail"]
    assert not rejected(Rejection("", "corrupt", "")).body()["acceptable"]


SENT = {
    **{"PatientName": "Müller^Jörg", "PatientID": "00471", "PatientBirthDate": "19600101", "PatientSex": "M"},
    **{"StudyDate": "20250102", "StudyTime": "101500", "AccessionNumber": "A1", "StudyID": "7"},
}


FOUND = {"name": "pleural effusion", "side": "left", "place": None, "size_mm": 12.5}
UNCODED = {"name": "lung opacity", "side": None, "place": None, "size_mm": None}


def structured(**attributes):
    """The SR of a report on two joined series."""
    instances = (("1.2", "1.2.840.10008.5.1.4.1.1.2", "1.2.1"), ("1.3", "1.2.840.10008.5.1.4.1.1.2", "1.3.1"))
    report = Report(
        **{
            "id": "a" * 32,
            "report": "An effusion.",
            "findings": [FOUND, UNCODED],
            "model": MODEL,
            "spec": {"name": "x", "hash": "0"},
        },
        **{"scan": SCAN.facts, "question": "?", "finished": True, "tokens": 3, "seconds": {}},
    )
    return pydicom.dcmread(io.BytesIO(structured_report(report, References("1.1", instances, header(**attributes)))))


def header(**attributes):
    """Of an image, with values as they are sent."""
    made = pydicom.Dataset()
    for keyword, value in {"SOPInstanceUID": "1.2.1", **attributes}.items():
        tag = pydicom.datadict.tag_for_keyword(keyword)
        vr = pydicom.datadict.dictionary_VR(tag)
        made.add(pydicom.DataElement(tag, vr, value, validation_mode=pydicom.config.IGNORE))
    return made


def test_a_structured_report_has_the_attributes_of_its_images():
    document = structured(**SENT)
    assert {name: str(document[name].value) for name in SENT} == SENT
    evidence = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert [each.SeriesInstanceUID for each in evidence] == ["1.2", "1.3"]
    assert structured().PatientID == "" == structured().StudyDate


def test_a_structured_report_has_all_of_patient_and_study_and_its_findings_in_codes():
    """Some attributes were left out; findings were prose."""
    document = structured(**SENT, PatientAge="065Y", StudyDescription="Chest", IssuerOfPatientID="Ward", Modality="CT")
    assert (document.PatientAge, document.StudyDescription, document.IssuerOfPatientID) == ("065Y", "Chest", "Ward")
    assert document.Modality == "SR" and document.SOPClassUID == pydicom.uid.ComprehensiveSRStorage
    assert (document.VerificationFlag, document.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    items = {each.ConceptNameCodeSequence[0].CodeMeaning: each for each in document.ContentSequence}
    model, checkpoint = items["Device Observer Model Name"], items["Device Observer Serial Number"]
    assert (model.TextValue, checkpoint.TextValue) == ("m", "c")
    assert "research use; unverified" in items["Comment"].TextValue
    (coded,) = [each for each in items["Findings"].ContentSequence if each.ValueType == "CODE"]
    assert coded.ConceptCodeSequence[0].CodeValue == "60046008"
    side, size = coded.ContentSequence
    assert side.ConceptCodeSequence[0].CodeMeaning == "Left"
    assert float(size.MeasuredValueSequence[0].NumericValue) == 12.5


def test_codes_are_those_of_dicoms_context_groups():
    known = {code for codes in concepts["SCT"].values() for code in codes}
    assert set(SNOMED) <= {entry.name for entry in lexicon().entries}
    assert len({code for code, _ in (*SNOMED.values(), *SIDES.values())} & known) >= 14


def test_a_fhir_report_has_subject_and_study():
    """It had none."""
    from fhir.resources.R4B.diagnosticreport import DiagnosticReport

    report = Report(
        **{"id": "a" * 32, "report": "An effusion.", "findings": [FOUND, UNCODED], "model": MODEL, "finished": True},
        **{"spec": {"name": "x", "hash": "0"}, "scan": SCAN.facts, "question": "?", "tokens": 3, "seconds": {}},
    )
    references = References("1.1", (("1.2", "1.2.3", "1.2.1"),), header(**SENT))
    told = json.loads(diagnostic_report(report, references))
    patient, study = told["contained"]
    assert told["subject"] == {"reference": "#patient"} == study["subject"]
    assert told["imagingStudy"] == [{"reference": "#study"}]
    assert (patient["identifier"][0]["value"], patient["birthDate"], patient["gender"]) == (
        "00471",
        "1960-01-01",
        "male",
    )
    assert [each["value"] for each in study["identifier"]] == ["urn:oid:1.1", "A1"]
    assert told["basedOn"][0]["identifier"]["value"] == "A1"
    assert [each["coding"][0]["code"] for each in told["conclusionCode"]] == ["60046008"]
    bare = DiagnosticReport.model_validate_json(
        diagnostic_report(report, References("1.1", references.instances, header(PatientBirthDate="19601399")))
    )
    assert bare.subject.reference == "#patient" and bare.basedOn is None


@pytest.mark.parametrize("offset", ["+0300", "-0930", "", "nonsense"])
def test_a_structured_reports_times_have_their_zone(offset):
    document = structured(TimezoneOffsetFromUTC=offset)
    zone = document.TimezoneOffsetFromUTC
    assert zone == (offset if offset[:1] in ("+", "-") else datetime.now().astimezone().strftime("%z"))
    made = datetime.strptime(document.ContentDate + document.ContentTime + zone, "%Y%m%d%H%M%S%z")
    assert abs(now() - made) < timedelta(hours=1)


def test_attributes_that_are_not_as_they_should_be_are_passed_on(recwarn):
    odd = {"StudyDate": "2025-01-02", "PatientID": "x" * 70, "AccessionNumber": "A" * 20}
    document = structured(**odd)
    assert document["PatientID"].value == odd["PatientID"]
    assert not any("x" * 70 in str(each.message) for each in recwarn)


def stored_job(status, attempts):
    made = now().isoformat()
    job = Job(id="a" * 32, status=status, created=made, updated=made, attempts=attempts)
    return StoredJob(job=job, options=ReportOptions(), files=1, beat=now())


@pytest.mark.parametrize(("status", "attempts", "end"), [("running", 5, "failed"), ("done", 1, "done")])
def test_a_job_that_never_ends_is_given_up_and_one_that_ended_is_closed(tmp_path, status, attempts, end):
    service = Service(None, None, None, ServingConfig(state=str(tmp_path)))
    service.store.add_job(stored_job(status, attempts), [b"scan"])
    asyncio.run(Jobs(service)._run(service.store.open_jobs()[0]))
    assert service.store.job("a" * 32).job.status == end
    assert service.store.open_ids() == [] and not list((tmp_path / "uploads").rglob("0*"))


def test_a_job_of_an_older_version_is_still_read(tmp_path):
    """It may have been asked for what there is no more; and all jobs behind it waited with it."""
    store = Store(str(tmp_path), None, 1)
    stored = StoredJob(
        job=Job(id="0" * 32, status="queued", created="", updated=""), options=ReportOptions(seed=3), beat=now()
    )
    store.add_job(stored, [])
    told = stored.model_dump(mode="json")
    told["options"]["saliency"] = True
    storage.write_json(f"{tmp_path}/jobs/{'0' * 32}.json", told)
    assert [each.options for each in store.open_jobs()] == [stored.options]


def test_an_upload_whose_job_never_came_to_be_is_found_and_deleted(tmp_path, monkeypatch):
    store, write = Store(str(tmp_path), None, 30), storage.write_bytes

    def breaks(uri, data):
        if "/jobs/" in uri:
            raise OSError("no space")
        write(uri, data)

    whole = stored_job("queued", 0)
    store.add_job(whole, [b"kept"])
    half = whole.model_copy(update={"job": whole.job.model_copy(update={"id": "b" * 32})})
    monkeypatch.setattr(storage, "write_bytes", breaks)
    with pytest.raises(OSError, match="no space"):
        store.add_job(half, [b"first", b"second"])
    assert store.forget_old() == 0  # it may still be on its way
    for path in tmp_path.rglob("*"):
        os.utime(path, (time.time() - 7200,) * 2)
    assert store.forget_old() == 1
    assert [path.read_bytes() for path in (tmp_path / "uploads").rglob("0*")] == [b"kept"]


def test_a_job_that_waits_is_not_forgotten_however_old(tmp_path):
    """Its mark among the open ones stayed, and no job was begun any more."""
    store = Store(str(tmp_path), None, keep_days=0.001)
    store.add_job(stored_job("queued", 0), [b"scan"])
    os.utime(tmp_path / "jobs" / ("a" * 32 + ".json"), (time.time() - 7200,) * 2)
    store.forget_old()
    assert len(store.open_jobs()) == 1


class Handle:
    """A deployment's handle: each call of the one method that is asked for gives the next answer."""

    def __init__(self, *answers):
        self.left, self.asked = list(answers), 0

    def __getattr__(self, method):
        return self

    def remote(self, *_):
        self.asked += 1
        future = asyncio.get_running_loop().create_future()
        future.set_result(self.left.pop(0) if len(self.left) > 1 else self.left[0])
        return future


SCAN = Scan(
    facts={
        **{"sha256": "0" * 64, "shape": (1, 1, 1), "spacing": (1, 1, 1), "orientation": "RAS", "warnings": ()},
        "format": "NIfTI",
    },
    voxels=np.zeros(1),
    chunk_mask=np.ones(1),
    affine=np.eye(4),
    spec_hash="",
    key="",
    seconds=0,
)
MODEL = {"id": "m", "stage": "sft", "checkpoint": "c"}
WRITTEN = Written("A nodule.", "?", 3, True, MODEL, {"name": "least", "hash": "0"}, 1, False, {"write": 1}, "")


def known(tmp_path, generator, reader=None, settings=None):
    """A service that knows what scans must look like."""
    settings = settings or ServingConfig(state=str(tmp_path))
    service = Service(reader or Handle(SCAN), generator, None, settings)
    service._learn(Status(True, spec=config.load("tiny").data.spec))
    return service


@pytest.mark.parametrize("streamed", [False, True])
def test_a_replica_that_is_not_ready_fails_no_request_that_another_can_serve(tmp_path, monkeypatch, streamed):
    monkeypatch.setattr("mu2llm.serving.calls.BACK_OFF_S", 0.0)
    loading = Refusal("not_ready", "the weights are being loaded")

    async def go(generator):
        service = known(tmp_path, generator)
        work = service.begin(Upload((b"",)), ReportOptions())
        if not streamed:
            return (await service.report(work)).report.report
        return [part async for part in service.stream(work, await service.read(work))][-1].report.report

    ends = Handle(loading, loading, WRITTEN)
    if streamed:
        ends = Streams(*[FakeStream([piece]) for piece in (loading, loading, WRITTEN)])
    assert asyncio.run(go(ends)) == "A nodule." and ends.asked == 3
    with pytest.raises(Problem) as told:
        asyncio.run(go(Streams(*[FakeStream([loading]) for _ in range(20)]) if streamed else Handle(loading)))
    assert (told.value.status, told.value.code) == (503, "not_ready")


def test_a_replica_that_is_not_ready_says_nothing_of_the_others(tmp_path):
    service = known(tmp_path, None)
    service._learn(Status(False, "the weights are being loaded"))
    with service.admitted():
        pass
    service._seen -= 60
    service._learn(Status(False, "the weights are being loaded"))
    with pytest.raises(Problem), service.admitted():
        pass


def test_a_replica_that_has_come_turns_nobody_away(tmp_path):
    """It did until its first look at the generator was over: 642 answers were 503 on a loaded machine."""
    ready = Handle(Status(True, spec=config.load("tiny").data.spec))
    service = Service(Handle(SCAN), ready, None, ServingConfig(state=str(tmp_path)))

    async def go():
        await service.start()
        with service.admitted():
            await service.stop()

    asyncio.run(go())
    assert ready.asked == 1


def test_a_structured_report_of_what_is_no_dicom_is_refused_before_anything_is_written(tmp_path):
    writer = Handle(WRITTEN)
    service = known(tmp_path, writer)

    async def go():
        await service.report(
            service.begin(Upload(uri=None, files=(b"",)), ReportOptions(), references=True, dicom_only=True)
        )

    with pytest.raises(Problem) as told:
        asyncio.run(go())
    assert told.value.status == 406 and writer.asked == 0


class SlowJudge:
    """Counts how many judge by it at a time."""

    identity = "slow"

    def __init__(self):
        self.now, self.most, self.go_on = 0, 0, threading.Event()

    def judge(self, pairs):
        self.now += 1
        self.most = max(self.most, self.now)
        self.go_on.wait()
        self.now -= 1
        return []


def test_a_judge_is_asked_by_one_at_a_time_and_no_more_wait_than_may():
    async def go():
        scorer = GreenScorer({}, max_ongoing_requests=3)
        scorer.judge = judge = SlowJudge()
        asked = [asyncio.create_task(scorer.score([])) for _ in range(5)]
        while judge.now == 0 or sum(each.done() for each in asked) < 2:
            await asyncio.sleep(0.01)
        assert await scorer.answers() and scorer.waiting == 3
        judge.go_on.set()
        return judge.most, await asyncio.gather(*asked)

    most, ends = asyncio.run(go())
    assert most == 1 and ends == [[], [], [], Refusal("busy"), Refusal("busy")]


@pytest.mark.parametrize(("end", "status", "code"), [("busy", 429, "busy"), ("down", 503, "scorer_down")])
def test_a_scorer_that_is_busy_is_not_down(end, status, code):
    service = Service(None, None, Handle(True, Refusal(end)), ServingConfig())
    with pytest.raises(Problem) as told:
        asyncio.run(service.green([PairIn(reference="a", candidate="b")]))
    assert (told.value.status, told.value.code) == (status, code)
    assert told.value.response().headers["retry-after"]


def test_whoever_asks_for_its_status_finds_a_free_place_at_a_busy_replica():
    made = deployments(Settings())
    for name, at_once in (("ReportGenerator", 64), ("GreenScorer", 32)):
        assert made[name]._deployment_config.max_ongoing_requests > at_once
    assert made["GreenScorer"]._deployment_config.max_queued_requests > 0


@pytest.mark.parametrize(
    ("percentile", "told", "header"),
    [
        (99.8, {"percentile": 99.8, "unlike": True}, "true"),
        (99.5, {"percentile": 99.5, "unlike": False}, None),
        (None, None, None),
    ],
)
def test_an_answer_says_whether_the_scan_is_unlike_the_training_scans(tmp_path, percentile, told, header):
    written = dataclasses.replace(WRITTEN, percentile=percentile)

    async def go():
        service = known(tmp_path, Handle(written))
        return await service.report(service.begin(Upload((b"",)), ReportOptions()))

    made = asyncio.run(go())
    for kind in (formats.JSON, formats.TEXT):
        answer = formats.respond(kind, made)
        assert answer.headers.get("X-Unlike-Training-Scans") == header
    assert json.loads(formats.respond(formats.JSON, made).body)["familiarity"] == told


@pytest.mark.parametrize("likely", [None, {"left pneumothorax": 0.97, "renal cyst": 0.0123}])
def test_an_answer_has_what_the_diagnostic_prior_says(tmp_path, likely):
    async def go():
        service = known(tmp_path, Handle(dataclasses.replace(WRITTEN, finding_probabilities=likely)))
        return await service.report(service.begin(Upload((b"",)), ReportOptions()))

    assert json.loads(formats.respond(formats.JSON, asyncio.run(go())).body)["finding_probabilities"] == likely


def test_the_series_that_was_read_is_named_by_a_digest(phantom):
    """A page finds it in the files that it has; who has not them learns nothing."""
    alone, joined = slices(chest()), slices(chest())
    for number, dataset in enumerate(joined):
        dataset.SeriesInstanceUID = f"{SERIES}.{number}"
    sources = [[phantom], *([to_bytes(dataset) for dataset in series] for series in (alone, joined))]
    spec = config.load("tiny").data.spec
    told = [read(Reading(source, spec, accept=("series_per_slice",)), 100).facts for source in sources]
    digests = [facts["series_uid_sha256"] for facts in told]
    assert digests == [None, hashlib.sha256(SERIES.encode()).hexdigest(), None]

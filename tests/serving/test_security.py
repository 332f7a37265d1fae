"""What a hostile client may not do; without a running service."""

import asyncio
import base64
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile

import httpx
import numpy as np
import psutil
import pydicom
import pytest
from ct_scans import to_bytes
from small_service import GUARD_S, PATIENT, PATIENT_ID, wait_for

from mu2llm import ct
from mu2llm.errors import Rejection, UserError
from mu2llm.serving import chat, decoder, fetcher, keys
from mu2llm.serving.child import KEPT, Child
from mu2llm.serving.decoder import Decoder, Reading, Scan
from mu2llm.serving.fetcher import Fetch
from mu2llm.serving.guard import Guard, Uploads, is_loopback
from mu2llm.serving.keys import Doorkeeper, hash_of, list_keys, make_key, revoke_key
from mu2llm.serving.problems import Problem, rejected
from mu2llm.serving.reader import VolumeReader
from mu2llm.serving.refusal import Refusal
from mu2llm.serving.uris import allowed, data_url
from mu2llm.settings.serving import ServingConfig

BELOW = ("s3://bucket/scans", "file:///srv/scans/")


@pytest.mark.parametrize(
    "uri",
    [
        *("s3://bucket/scans/a.nii.gz", "file:///srv/scans/b/c.nii.gz", "s3://bucket/scans/my scan/100%.nii.gz"),
        *("file:///srv/scans/my scan.nii.gz", "file:///srv/scans/100%/a+b.nii", "file:///srv/scans/ünï%20.nii"),
    ],
)
def test_uris_below_an_allowed_place(uri):
    assert allowed(uri, BELOW) == uri


@pytest.mark.parametrize("place", ["/srv/scans", "/srv/scans/", "file:///srv/scans"])
def test_a_path_is_the_uri_of_its_file(place):
    assert allowed("/srv/scans/my scan.nii.gz", [place]) == "file:///srv/scans/my scan.nii.gz"


@pytest.mark.parametrize(
    "uri",
    [
        *("s3://bucket/scans-of-others/a", "s3://bucket/scansx", "s3://other/scans/a", "s3://bucket/scans/../secret"),
        *("/etc/passwd", "file:///etc/passwd", "file:///srv/scans/../../etc/passwd", "file:///srv/scans/./x"),
        *("http://169.254.169.254/latest/meta-data", "https://bucket/scans/a", "gopher://x", "s3://bucket/scans//x"),
        *(
            "s3://bucket/scans/%2e%2e/x",
            "s3://bucket/scans/%2E./x",
            "file:///srv/scans/..%2fx",
            "/srv/scansx",
            "/srv/scans/../x",
            "s3://bucket/scans/a?versionId=1",
            "s3://bucket/scans/a\r\nX: y",
            "S3://bucket",
        ),
        *("s3://bucket@evil/scans/a", "", "s3://", "bucket/scans/a"),
    ],
)
def test_all_other_uris_are_refused_alike(uri):
    with pytest.raises(Problem) as told:
        allowed(uri, BELOW)
    assert (told.value.status, told.value.code) == (403, "uri_not_allowed")
    assert uri == "" or uri not in told.value.detail


def test_a_link_does_not_lead_out(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("x")
    os.symlink(tmp_path / "secret", tmp_path / "in" / "link")
    with pytest.raises(Problem):
        allowed(f"file://{tmp_path}/in/link", (f"file://{tmp_path}/in",))


def test_data_urls_must_be_sound():
    assert data_url("data:application/gzip;base64,QUJD") == b"ABC"
    assert data_url("s3://bucket/x") is None
    for url in ("data:;base64,????", "data:;base64,QQ", "data:text/plain,x"):
        with pytest.raises(Problem) as told:
            data_url(url)
        assert told.value.status == 422


@pytest.mark.parametrize("escaped", [False, True])
def test_a_long_data_url_is_no_work_for_a_json_parser(escaped):
    """It held the interpreter, and with it all other requests, for seconds."""
    scan = os.urandom(2**22)
    told = json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": _url(scan)}]}]})
    body = bytearray((told.replace("/", "\\/") if escaped else told).encode())
    rest, cut = chat._cut(body)
    assert len(rest) < 200 and len(cut) == 1
    request, upload = chat.parse(body)
    assert upload.files == (scan,) and request.messages[0].role == "user"


def _url(scan):
    return {"url": "data:application/octet-stream;base64," + base64.b64encode(scan).decode()}


def test_a_long_text_stays_a_text():
    text = "data:text/plain;base64," + "A" * 2**17
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": "s3://b/x"}}]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    request, upload = chat.parse(bytearray(body))
    assert request.messages[0].text == text and upload.uri == "s3://b/x"


def passes(door, given, scope="read"):
    """200, or the status of the Problem."""
    try:
        asyncio.run(door.check(given, scope))
    except Problem as problem:
        return problem.status
    return 200


def test_keys_are_stored_as_hashes_and_have_scopes(tmp_path):
    state = str(tmp_path)
    key = make_key(state, "reading room", ("read",))
    assert key.rpartition("_")[2] not in (tmp_path / "keys.json").read_text()
    door = Doorkeeper(state, needed=True)
    assert passes(door, key) == 200 and passes(door, key, "score") == 403
    assert [passes(door, given) for given in (None, key + "x", "mu2_x_y")] == [401] * 3
    revoke_key(state, list_keys(state)[0].id)
    assert passes(Doorkeeper(state, needed=True), key) == 401
    assert passes(Doorkeeper(state, needed=False), None) == 200
    with pytest.raises(UserError, match="there are read, score, correct"):
        make_key(state, "x", ("admin",))


def test_the_token_of_a_start_opens_everything_whatever_storage_does(tmp_path):
    """Behind a reverse proxy on the same host, a service on loopback was open to the network."""
    (tmp_path / "keys.json").write_text("{")
    door = Doorkeeper(str(tmp_path), needed=True, token_sha256=hash_of("secret"))
    assert [passes(door, "secret", scope) for scope in ("read", "score", "correct")] == [200] * 3
    assert [passes(door, given) for given in (None, "", "Secret", "mu2_x_y")] == [503] * 4
    (tmp_path / "keys.json").unlink()
    door = Doorkeeper(str(tmp_path), needed=True)
    assert passes(door, "") == passes(door, None) == 401  # without a token none is empty


def test_keys_that_cannot_be_read_let_nobody_in_but_those_that_were_known(tmp_path, monkeypatch):
    """Each request was a 500."""
    monkeypatch.setattr(keys, "REFRESH_S", 0.0)
    state = str(tmp_path)
    key = make_key(state, "reading room", ("read",))
    whole, door = (tmp_path / "keys.json").read_text(), Doorkeeper(state, needed=True)
    assert passes(door, key) == 200
    for broken in (whole[:-20], '{"keys": [{"id": "x"}]}', "[]"):
        (tmp_path / "keys.json").write_text(broken)
        assert passes(door, key) == 200 and passes(door, "mu2_x_y") == passes(door, None) == 401
        assert passes(Doorkeeper(state, needed=True), key) == passes(Doorkeeper(state, needed=True), None) == 503
    monkeypatch.setattr(keys, "KEPT_S", 0.0)
    assert passes(door, key) == 503
    (tmp_path / "keys.json").write_text(whole)
    monkeypatch.setattr(keys, "KEPT_S", 600.0)
    assert passes(door, key) == 200


def test_storage_of_keys_that_hangs_holds_up_nobody_else(tmp_path, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(keys, "list_keys", lambda state: go_on.wait() and ())
    monkeypatch.setattr(keys, "WAIT_S", 0.2)

    async def go():
        door = Doorkeeper(str(tmp_path), needed=True)
        asked = [asyncio.create_task(door.check("mu2_x_y", "read")) for _ in range(3)]
        await asyncio.sleep(0.01)  # the loop goes on
        assert not any(task.done() for task in asked)
        told = await asyncio.gather(*asked, return_exceptions=True)
        go_on.set()
        return [problem.code for problem in told]

    assert asyncio.run(go()) == ["keys"] * 3


def test_addresses_of_this_machine():
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("10.0.0.1")


async def _echo(scope, receive, send):
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


def ask(body=b"", headers=None, hosts=("localhost",), method="POST", origins=()):
    counted = []
    guard = Guard(_echo, Uploads(100, 60, 1), hosts, origins, lambda path, status: counted.append(status))

    async def go():
        transport = httpx.ASGITransport(app=guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.request(method, "/", content=body, headers=headers or {})

    answer = asyncio.run(go())
    assert counted == [answer.status_code]
    return answer


def test_bodies_are_limited_whether_they_say_their_length_or_not():
    async def pieces():
        for _ in range(5):
            yield b"x" * 30

    assert ask(b"x" * 100).text == "100"
    assert ask(b"x" * 101).status_code == 413
    assert ask(pieces()).status_code == 413


def test_pages_of_others_can_neither_read_nor_write():
    assert ask(headers={"host": "evil.example"}).status_code == 403
    assert ask(headers={"host": "evil.example"}, hosts=None).status_code == 200
    assert ask(headers={"origin": "https://evil.example"}).status_code == 403
    assert ask(headers={"origin": "http://localhost:8000"}).status_code == 200
    proxied = {"origin": "https://reports.example"}  # as a reverse proxy passes it on, with a Host of its own
    assert ask(headers=proxied).status_code == 403
    assert ask(headers=proxied, origins=("https://reports.example/",)).status_code == 200
    # with no-referrer a browser sends the plain page's own form with Origin: null
    assert ask().headers["referrer-policy"] == "same-origin"


def test_what_is_text_alone_has_a_smaller_limit():
    guard = Guard(_echo, Uploads(1024**3, 60, 1), None, (), lambda path, status: None)

    async def go(path):
        transport = httpx.ASGITransport(app=guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return (await client.post(path, content=b"x" * (9 * 2**20))).status_code

    assert [asyncio.run(go(path)) for path in ("/v1/green", "/v1/corrections", "/v1/reports")] == [413, 413, 200]


def test_no_message_of_a_rejection_that_may_hold_names_is_told():
    told = rejected(Rejection("s3://b/x", "unsafe_archive", f"member '../{PATIENT}' points outside"))
    assert told.status == 400 and PATIENT not in json.dumps(told.body()) and "s3" not in json.dumps(told.body())


SPEC = {"name": "least", "windows": [[-1000, 400]], "grid": [8, 16, 16], "chunks": 2, "fit": "stretch"}


@pytest.fixture(scope="module")
def spec():
    from mu2llm.records import PreprocessSpec

    return PreprocessSpec.model_validate(SPEC)


@pytest.fixture(scope="module")
def reader():
    made = Decoder(seconds=20, memory=4 * 2**30, max_slices=200)
    yield made
    made.close()


def read(reader, spec, *files, **more):
    return asyncio.run(reader.read(Reading(list(files), spec, **more)))


def archive(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return stream.getvalue()


@pytest.mark.slow
def test_archives_and_bombs(reader, spec, dicom):
    climbing = archive(**{"../../etc/cron.d/x": dicom[0]})
    assert read(reader, spec, climbing).reason == "unsafe_archive"
    bomb = archive(**{"a.dcm": bytes(2**28)})
    assert len(bomb) < 2**20 and read(reader, spec, bomb).reason == "too_large"
    assert read(reader, spec, gzip.compress(bytes(2**28))).reason in ("unsupported_format", "truncated", "corrupt")
    header = _nifti_header((4000, 4000, 4000))
    assert read(reader, spec, gzip.compress(header + bytes(2**20))).reason == "too_large"


def _nifti_header(shape):
    import nibabel as nib
    import numpy as np

    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header.binaryblock + bytes(4)


@pytest.mark.slow
def test_a_scan_of_too_many_slices(spec, phantom):
    made = Decoder(seconds=20, memory=4 * 2**30, max_slices=10)
    assert read(made, spec, phantom).reason == "too_large"
    made.close()


@pytest.mark.slow
def test_the_decoder_is_killed_when_it_takes_too_long_and_comes_back(spec, phantom):
    made = Decoder(seconds=0.0, memory=4 * 2**30, max_slices=200)
    assert read(made, spec, phantom) == Refusal("slow")
    made.seconds = 60
    assert isinstance(read(made, spec, phantom), Scan)
    made._children[decoder.DECODES].kill()
    assert read(made, spec, phantom) in (Refusal("crashed"),) or isinstance(read(made, spec, phantom), Scan)
    assert isinstance(read(made, spec, phantom), Scan)
    made.close()


@pytest.mark.slow
def test_who_leaves_holds_up_nobody(spec, phantom):
    """Its decoder went back into the pool and read on: the next scan waited for it, beside idle decoders."""

    async def go():
        reader = VolumeReader(ServingConfig(reading_seconds=60, reader={"max_ongoing_requests": 2}).model_dump())
        warm = reader.decoders[-1]
        reading = Reading([phantom], spec)
        assert isinstance(await reader.read(reading), Scan)
        child = warm._children[decoder.DECODES]
        os.kill(child.process.pid, signal.SIGSTOP)  # as if the scan were large
        leaves = asyncio.create_task(reader.read(reading))
        await asyncio.sleep(0.1)
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        assert not child.alive and not warm.warm and reader.decoders[0] is warm
        scan = await reader.read(reading)
        for each in reader.decoders:
            each.close()
        return scan

    assert isinstance(asyncio.run(go()), Scan)


def test_memory_that_runs_out_costs_one_scan(monkeypatch, spec):
    def hungry(*_):
        raise MemoryError

    monkeypatch.setattr(decoder, "read", hungry)
    assert decoder.answer((Reading([b""], spec), 10)) == Refusal("too_large")


@pytest.mark.parametrize("sealed", [True, False])
def test_what_decodes_has_no_network_and_no_secret(monkeypatch, sealed):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    made = Child("probe:look", 2**30, sealed)
    environment, sockets = made.ask(None, GUARD_S)
    made.end()
    assert ("AWS_SECRET_ACCESS_KEY" in environment) == (not sealed) == bool(sockets)
    assert not sealed or environment <= {*KEPT, "PYTHONPATH"}


def test_a_child_ends_with_its_parent():
    """Also where it is killed, in the middle of a scan."""
    parent = (
        "import os, sys; from mu2llm.serving.child import Child\n"
        f"made = Child('probe:look', 2**30, True); made.ask(None, {GUARD_S})\n"
        "print(made.process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: not psutil.pid_exists(int(done.stdout)))


@pytest.mark.slow
def test_what_is_fetched_is_what_lies_there(dicom, tmp_path, phantom):
    """A folder with folders in it, a header with its voxels beside it, a file under its own name."""
    (tmp_path / "series" / "sub").mkdir(parents=True)
    for number, data in enumerate(dicom):
        (tmp_path / "series" / ("sub" if number % 2 else "") / f"{number}.dcm").write_bytes(data)
    (tmp_path / "scan.nii.gz").write_bytes(phantom)
    hu = np.zeros((8, 8, 8), np.int16)
    lines = "ObjectType = Image\nNDims = 3\nDimSize = 8 8 8\nElementSpacing = 1 1 1\nElementType = MET_SHORT\n"
    (tmp_path / "scan.mhd").write_text(f"{lines}ElementDataFile = voxels.raw\n")
    (tmp_path / "voxels.raw").write_bytes(hu.tobytes())
    for name in ("series", "scan.nii.gz", "scan.mhd"):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        fetched = fetcher.fetch(Fetch(f"file://{tmp_path}/{name}", str(folder)), 10)
        accept = ("unknown_orientation",)
        here, there = (ct.read(place, accept=accept) for place in (fetched, tmp_path / name))
        assert str(folder) in fetched and np.array_equal(here.hu, there.hu)
    (tmp_path / "scan.mhd").write_text(f"{lines}ElementDataFile = ../secret\n")
    refused = fetcher.answer((Fetch(f"file://{tmp_path}/scan.mhd", str(tmp_path / "of series")), 10))
    assert refused.reason == "unsafe_archive"
    assert fetcher.answer((Fetch(f"file://{tmp_path}/none", str(tmp_path)), 10)).reason == "not_found"


@pytest.mark.slow
def test_nothing_of_the_patient_leaves_the_decoder(reader, spec, dicom, capfd):
    scan = read(reader, spec, *dicom, references=True)
    assert isinstance(scan, Scan) and len(scan.references.instances) == len(dicom)
    told = repr((scan.facts, scan.references)) + "".join(capfd.readouterr())
    assert PATIENT not in told and PATIENT_ID not in told


def test_the_instances_of_whatever_can_be_read(spec, dicom):
    """Of gzipped files, zips in zips and series of one slice each there were none, and an SR was refused."""
    plain = decoder.read(Reading(dicom, spec, references=True), 200).references
    zipped = archive(**{f"{n}.dcm": data for n, data in enumerate(dicom)})
    for packed in ([gzip.compress(data) for data in dicom], [archive(inner=zipped)]):
        assert decoder.read(Reading(packed, spec, references=True), 200).references == plain
    assert plain.header["PatientID"].value == PATIENT_ID
    own = [pydicom.dcmread(io.BytesIO(data)) for data in dicom]
    for number, dataset in enumerate(own):
        dataset.SeriesInstanceUID = f"1.9.{number}"
    reading = Reading([to_bytes(each) for each in own], spec, ("series_per_slice",), references=True)
    joined = decoder.read(reading, 200).references
    assert len({series for series, *_ in joined.instances}) == len(dicom)


def test_a_study_is_read_with_as_many_series_as_the_model_takes(spec, dicom):
    """The report was about one of them, whatever the model takes."""
    soft = [pydicom.dcmread(io.BytesIO(data)) for data in dicom[:-1]]
    for number, dataset in enumerate(soft):
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = "1.8", f"1.8.{number}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    sent = [*(to_bytes(each) for each in soft), *dicom]
    one = decoder.read(Reading(sent, spec, references=True), 200)
    assert one.facts["series"] == 1 and len(one.references.instances) == len(dicom)
    of_two = spec.model_copy(update={"series": 2})
    both = decoder.read(Reading(sent, of_two, references=True), 200)
    assert both.facts["series"] == 2 and both.facts["sha256"] == one.facts["sha256"]
    assert len(both.references.instances) == len(sent) and both.facts["warnings"] == []
    np.testing.assert_array_equal(both.voxels[: len(one.voxels)], one.voxels)
    assert both.chunk_mask.all() and both.voxels[len(one.voxels) :].any()
    zipped = archive(**{f"{n}.dcm": data for n, data in enumerate(sent)})
    assert decoder.read(Reading([zipped], of_two), 200).key == both.key
    alone = decoder.read(Reading(dicom, of_two), 200)
    assert alone.facts["series"] == 1 and "series_missing" in alone.facts["warnings"]


@pytest.mark.parametrize("packed", [True, False])
def test_the_instances_of_a_scan_that_was_named_by_its_uri(spec, dicom, tmp_path, packed):
    """They were known of uploads alone."""
    (tmp_path / "series").mkdir()
    for number, data in enumerate(dicom):
        (tmp_path / "series" / f"{number}.dcm").write_bytes(data)
    (tmp_path / "series.zip").write_bytes(archive(**{f"{n}.dcm": data for n, data in enumerate(dicom)}))
    uri = f"file://{tmp_path}/series" + (".zip" if packed else "")
    found = decoder.read(Reading(uri, spec, references=True), 200).references
    sent = decoder.read(Reading(dicom, spec, references=True), 200).references
    assert found.study == sent.study and found.header.PatientID == PATIENT_ID
    assert sorted(found.instances) == sorted(sent.instances) and len(found.instances) == len(dicom)
    assert decoder.read(Reading(uri, spec), 200).references is None

"""What a sentence depended on comes back to the place in the scan that it was taken from, and only when it is asked."""

import asyncio
import base64
import dataclasses

import nibabel as nib
import numpy as np
import pytest
from small_writer import FIRST, QUESTION
from test_drafts import Client
from test_generator import SPEC, scan, with_generator
from test_parts import MODEL, SCAN, Handle

from mu2llm.ct import SPECS, CTVolume, prepare, whole
from mu2llm.engine import occlusion
from mu2llm.serving.exchange import InfluenceRequest, ReportRequest
from mu2llm.serving.influence import overlay, spans
from mu2llm.serving.refusal import Refusal

AFFINE = np.array([[2.0, 0, 0, -71], [0, 2.5, 0, 33], [0, 0, 5, -412], [0, 0, 0, 1]])
TURNED = np.array([[0, -2.5, 0, 90], [2.0, 0, 0, -20], [0, 0, 5, 7], [0, 0, 0, 1.0]])
FOUND = [{"text": "A nodule.", "start": 0, "end": 9, "drop": 1.5, "random": 0.1, "nifti": "AAAA"}]


def body(place):
    """A block of soft tissue in air, off the centre, with one bright voxel's neighbourhood."""
    hu = np.full((60, 50, 40), -1000, np.int16)
    hu[8:55, 5:40, 3:38] = 40
    x, y, z = place
    hu[x - 2 : x + 3, y - 2 : y + 3, z - 1 : z + 2] = 1100
    return hu


@pytest.mark.parametrize("affine", [AFFINE, TURNED], ids=["straight", "turned"])
@pytest.mark.parametrize("fit", ["stretch", "isotropic"])
@pytest.mark.parametrize("place", [(20, 15, 12), (45, 30, 30)])
def test_a_bright_spot_is_found_where_it_is_in_the_world(affine, fit, place):
    spacing = (2.0, 2.0, 2.0) if fit == "isotropic" else None
    spec = SPECS["demo"].model_copy(update={"fit": fit, "spacing_mm": spacing})
    prepared = prepare(CTVolume(body(place), affine), spec)
    bone = whole(prepared.voxels, spec)[2].astype(float)  # (Z, Y, X)
    cells = bone.reshape(8, 4, 8, 8, 8, 8).max(axis=(1, 3, 5))
    image = nib.Nifti1Image.from_bytes(overlay(cells, prepared.affine, spec.grid))
    values = np.asarray(image.dataobj)
    assert values.shape == (8, 8, 8) and values.dtype == np.uint8 and values.max() == 255
    index = np.unravel_index(values.argmax(), values.shape)
    there = image.affine @ [*index, 1]
    true = affine @ [*place, 1]
    half = nib.affines.voxel_sizes(image.affine) / 2
    reach = np.abs(image.affine[:3, :3] / nib.affines.voxel_sizes(image.affine)) @ half  # along the world's axes
    assert (np.abs(there - true)[:3] <= reach + 2 * np.abs(affine[:3, :3]).sum(axis=1)).all()


def test_the_first_cell_is_centred_within_its_voxels():
    image = nib.Nifti1Image.from_bytes(overlay(np.ones((4, 2, 2)), np.eye(4), (16, 16, 16)))
    np.testing.assert_allclose(image.affine @ [0, 0, 0, 1], [3.5, 3.5, 1.5, 1])
    np.testing.assert_allclose(image.affine @ [1, 1, 3, 1], [11.5, 11.5, 13.5, 1])


def test_what_speaks_against_a_sentence_is_not_shown():
    image = nib.Nifti1Image.from_bytes(overlay(np.array([[[-3.0, 0], [1, 2]]]), np.eye(4), (1, 2, 2)))
    np.testing.assert_array_equal(np.asarray(image.dataobj)[..., 0], [[0, 128], [0, 255]])


def test_sentences_are_where_they_stand():
    report = "Findings:  A  nodule of 3.5 mm. A nodule of 3.5 mm.\nImpression: Nodule."
    found = spans(report)
    assert [report[s.start : s.end] for s in found] == [s.text for s in found]
    assert [s.text.split() for s in found] == [["A", "nodule", "of", "3.5", "mm."]] * 2 + [["Nodule."]]
    assert found[1].start > found[0].end


# ---- the generator


def asked(generator, report=FIRST, model=None, scanned=None):
    return InfluenceRequest(scanned or scan(0), QUESTION, report, model or generator.loaded.facts["id"])


def test_each_sentence_is_told_with_its_place_beside_a_report_that_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(occlusion, "LEAST", 0)  # this model has learnt its report by heart

    async def use(generator):
        return await asyncio.gather(generator.influence(asked(generator)), generator.write(ReportRequest("a", scan(1))))

    found, written = with_generator(checkpoint, tmp_path, use)
    assert written.text == FIRST
    assert [each["text"] for each in found] == [FIRST[each["start"] : each["end"]] for each in found]
    assert len(found) == 4
    for each in found:
        if each["nifti"] is not None:
            assert each["drop"] >= each["random"]
            image = nib.Nifti1Image.from_bytes(base64.b64decode(each["nifti"]))
            assert image.shape == (16, 16, 8)  # every voxel of the model's grid


def test_who_leaves_is_looked_for_no_further(checkpoint, tmp_path, monkeypatch):
    batches, plain = [], occlusion.Occlusion._drops
    monkeypatch.setattr(occlusion.Occlusion, "_drops", lambda self, *what: batches.append(1) or plain(self, *what))

    async def use(generator):
        leaving = asyncio.create_task(generator.influence(asked(generator)))
        while not batches:
            await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.wait([leaving])
        before = len(batches)
        return before, await generator.influence(asked(generator, "No finding."))

    before, after = with_generator(checkpoint, tmp_path, use)
    whole_work = len(batches) - before
    assert before < whole_work and [each["text"] for each in after] == ["No finding."]


@pytest.mark.parametrize("report", ["", "Findings:"])
def test_a_report_without_a_sentence_depended_on_nothing(checkpoint, tmp_path, report):
    async def use(generator):
        return await generator.influence(asked(generator, report))

    assert with_generator(checkpoint, tmp_path, use) == []


def test_what_cannot_be_told_is_refused(checkpoint, tmp_path):
    other = scan(0, SPEC.model_copy(update={"fit": "isotropic"}))

    async def use(generator):
        requests = [asked(generator, model="another"), asked(generator, scanned=other)]
        told = [await generator.influence(each) for each in requests]
        long = dataclasses.replace(asked(generator), question="word " * 700)
        told.append(await generator.influence(long))
        known, generator.loaded = asked(generator), None
        return [*told, await generator.influence(known)]

    reasons = [each.reason for each in with_generator(checkpoint, tmp_path, use)]
    assert reasons == ["another_model", "wrong_spec", "too_long", "not_ready"]


# ---- over HTTP, without Ray


class InfluenceHandle(Handle):
    """A generator's handle that writes, and then tells this of influence."""

    def __init__(self, written, told):
        super().__init__(written)
        self.told, self.method = told, ""

    def __getattr__(self, method):
        self.method = method
        return self

    def remote(self, *what):
        if self.method != "influence":
            return super().remote(*what)
        self.request = what[0]
        future = asyncio.get_running_loop().create_future()
        future.set_result(self.told)
        return future


def answered(tmp_path, told, sha256=None):
    """A draft, and what is answered where its influence is asked for, of the scan of the draft or another one."""
    client = Client(tmp_path)
    plain = client.service.generator.handle
    handle = client.service.generator.handle = InfluenceHandle(plain.left[0], told)
    draft = client.report()
    sent = client("POST", "/v1/scans", files={"scan": b"x"}).json()["id"]
    if sha256:
        client.service.reader.calls.handle.left[0] = dataclasses.replace(SCAN, facts={**SCAN.facts, "sha256": sha256})
    return client("POST", f"/v1/drafts/{draft}/influence", json={"scan": sent}), handle, client


def test_a_drafts_own_words_and_model_are_asked_about(tmp_path):
    answer, handle, client = answered(tmp_path, FOUND)
    assert answer.status_code == 200 and answer.json()["sentences"] == FOUND
    request = handle.request
    assert (request.report, request.question, request.model) == ("A nodule.", "?", MODEL["id"])
    assert not client.service.bodies.held


@pytest.mark.parametrize(
    ("told", "sha256", "status", "code"),
    [
        (FOUND, "1" * 64, 409, "another_scan"),
        (Refusal("another_model"), None, 409, "another_model"),
        (Refusal("broken", "KeyError"), None, 500, "internal"),
    ],
)
def test_of_another_scan_or_model_nothing_is_told(tmp_path, told, sha256, status, code):
    answer, _, _ = answered(tmp_path, told, sha256)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_scan_has_to_be_named_and_a_draft_there(tmp_path):
    client = Client(tmp_path)
    draft = client.report()
    assert client("POST", f"/v1/drafts/{draft}/influence", json={}).status_code == 422
    assert client("POST", f"/v1/drafts/{draft}/influence", json={"scan": "0" * 32}).status_code == 404
    assert client("POST", f"/v1/drafts/{'0' * 32}/influence", json={"scan": "0" * 32}).status_code == 404

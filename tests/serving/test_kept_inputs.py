"""From the service to DPO: a correction of a scan that no shard has becomes a pair about what the model saw of it."""

import asyncio
import json
import os
import shutil
import time

import in_process
import numpy as np
import pyarrow.parquet as pq
import pytest
from small_writer import FIRST
from small_writer import experiment as small
from test_drafts import EDITED, TEXT, Client

from mu2llm import config, storage
from mu2llm.cases import Shards, Stream
from mu2llm.cases.shards import Index, Joined, write_derived, write_file, write_index
from mu2llm.ct import phantom
from mu2llm.engine import kept_inputs
from mu2llm.errors import UserError
from mu2llm.green import load_judge
from mu2llm.records import Case
from mu2llm.serving import audit, decoder
from mu2llm.serving.rollouts import LOADING
from mu2llm.serving.store import Store
from mu2llm.stages import dpo
from mu2llm.stages.corrections import read_corrections
from mu2llm.stages.preferences import CORRECTED, Preferences, prefer, read_pairs

SPEC = small().data.spec


def scan(seed, spec=SPEC):
    """What a reader gives of a phantom."""
    return decoder.read(decoder.Reading([phantom.make(seed, 1).nifti()], spec), max_slices=2500)


def experiment(**dpo):
    values = small().model_dump(mode="json")
    values["preferences"]["max_cases"] = 0  # corrections alone
    values["dpo"] |= {"workers": 0, "batch_size": 2, "max_steps": 1, "log_steps": 1, "warmup": 0, **dpo}
    return config.validate(values)


def corrected(state, seen, text=EDITED, **settings):
    """The id of a draft that was corrected over HTTP."""
    client = Client(state, seen, keep_inputs=True, **settings)
    draft = client.report()
    assert client("POST", "/v1/corrections", json={"id": draft, "edited": text}).status_code == 201
    return draft


def files(place, pattern="*"):
    return sorted(path.name for path in place.glob(pattern) if path.is_file())


@pytest.fixture
def held(tmp_path):
    """A client whose scan's input is held with the draft, and the draft."""
    client = Client(tmp_path, scan(9), keep_inputs=True)
    return client, client.report()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Phantom 1 to train on, phantom 2 to test on."""
    place = tmp_path_factory.mktemp("shards")
    scans = {"train": scan(1), "test": scan(2)}
    given = {"volume": "s3://b/x.nii.gz", "report": FIRST}
    cases = [Case(id=f"case-{split}", patient=split, split=split, **given) for split in scans]
    parent = write_index(str(place / "cases"), Index.of(SPEC, {split: [] for split in scans}), cases)
    files = {}
    for split, seen in scans.items():
        row = {"id": [f"case-{split}"], "report": [FIRST], "questions": ["[]"]} | tensors(seen)
        files[split] = [write_file(str(place / "shards"), f"{split}/0.parquet", iter([row]))]
    return write_derived(str(place / "shards"), files, parent).uri


def tensors(seen):
    return {"voxels": seen.voxels[None], "chunk_mask": seen.chunk_mask[None]}


def test_an_input_is_held_with_its_draft_and_kept_with_its_correction(tmp_path, held):
    client, draft = held
    assert files(tmp_path / "inputs") == [f"{draft}.parquet"] and not (tmp_path / "corrections").exists()
    for text in (EDITED, "No nodule at all."):
        client("POST", "/v1/corrections", json={"id": draft, "edited": text})
    assert files(tmp_path / "inputs") == []
    assert files(tmp_path / "corrections" / "inputs") == [f"{draft}.parquet"]
    kept = kept_inputs.parse((tmp_path / "corrections" / "inputs" / f"{draft}.parquet").read_bytes())
    seen = scan(9)
    assert np.array_equal(kept.voxels, seen.voxels) and np.array_equal(kept.chunk_mask, seen.chunk_mask)
    assert {each.input_key for each in read_corrections(str(tmp_path / "corrections"))} == {seen.key}


def test_nothing_but_voxels_is_kept(tmp_path, dicom):
    """Of a DICOM series with a name, an id and a study in its headers."""
    seen = decoder.read(decoder.Reading(dicom, SPEC), max_slices=2500)
    draft = corrected(tmp_path, seen)
    file = pq.ParquetFile(tmp_path / "corrections" / "inputs" / f"{draft}.parquet")
    assert file.schema_arrow.names == ["voxels", "chunk_mask"]
    told = json.loads(file.metadata.metadata[b"mu2llm"])
    assert told.keys() == {"rows", "sha256", "spec_hash"} and told["spec_hash"] == SPEC.hash


def test_without_consent_nothing_is_kept(tmp_path, held):
    client = Client(tmp_path / "other", scan(9))
    draft = client.report()
    client("POST", "/v1/corrections", json={"id": draft, "edited": EDITED})
    assert not list((tmp_path / "other").rglob("*.parquet"))
    client, draft = held  # and where it is no longer wanted when the correction comes
    Client(tmp_path)("POST", "/v1/corrections", json={"id": draft, "edited": EDITED})
    assert not (tmp_path / "corrections" / "inputs").exists()


@pytest.mark.parametrize("wanted", [True, False])
def test_the_log_says_at_the_start_that_consent_is_needed(tmp_path, caplog, monkeypatch, wanted):
    monkeypatch.setattr("mu2llm.serving.service.status_of", lambda *_: asyncio.sleep(0, LOADING))

    async def start():
        service = Client(tmp_path, keep_inputs=wanted).service
        await service.start()
        await service.stop()

    asyncio.run(start())
    assert ("patient's consent" in caplog.text) == wanted


@pytest.mark.parametrize("decision", ["accepted", "rejected"])
def test_what_is_decided_needs_no_input(tmp_path, held, decision):
    client, draft = held
    assert client("POST", "/v1/decisions", json={"id": draft, "decision": decision}).status_code == 200
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_held_input_goes_with_its_old_draft_and_a_kept_one_stays(tmp_path, held):
    corrected(tmp_path, scan(8))
    for path in (*(tmp_path / "inputs").iterdir(), *(tmp_path / "corrections").rglob("*")):
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    assert Store(str(tmp_path), None, 30).forget_old() == 1
    assert files(tmp_path / "inputs") == [] and len(files(tmp_path / "corrections" / "inputs")) == 1


def test_consent_that_is_withdrawn_takes_all_along(tmp_path, held):
    client, draft = held
    for text in (EDITED, "No nodule at all."):
        client("POST", "/v1/corrections", json={"id": draft, "edited": text})
    other = corrected(tmp_path, scan(8))
    line = next((tmp_path / "corrections").glob(f"{draft}-*.jsonl"))
    line.rename(tmp_path / "corrections" / line.name.partition("-")[2])  # as it was named before
    assert client("DELETE", f"/v1/drafts/{draft}").status_code == 204
    assert [path.name for path in tmp_path.rglob(f"*{draft}*") if "audit" not in path.parts] == []
    assert [each.report_id for each in read_corrections(str(tmp_path / "corrections"))] == [other]
    assert files(tmp_path / "corrections" / "inputs") == [f"{other}.parquet"]
    last = audit.entries(str(tmp_path))[-1]
    assert (last.action, last.about, last.principal) == ("deleted", draft, client.key)
    for gone in (draft, "0" * 32, "x"):
        assert client("DELETE", f"/v1/drafts/{gone}").status_code == 404
    (tmp_path / "reports" / f"{other}.json").unlink()  # too old to be corrected; the correction is there
    assert client("DELETE", f"/v1/drafts/{other}").status_code == 204
    assert not list((tmp_path / "corrections").rglob("*.*"))


def test_a_corrected_scan_outside_the_shards_reaches_dpo(
    tmp_path, shards, checkpoint, empty_store, ray_cluster, monkeypatch
):
    monkeypatch.setattr("ray.data.Dataset.map_batches", in_process.map_batches)
    monkeypatch.setattr("mu2llm.stages.placement.workers_that_fit", lambda need: 1)
    judge = load_judge(experiment().judge)
    shutil.copy(empty_store, tmp_path / "tracking.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracking.db")
    state, out = tmp_path / "state", str(tmp_path / "pairs")
    place, seen = str(state / "corrections"), scan(9)
    new, again = corrected(state, seen), corrected(state, seen, "No effusion.")
    corrected(state, scan(1))
    corrected(state, scan(2), "Of a test scan.")
    corrected(state, scan(9, small(windows=[[-160, 240]]).data.spec))
    damaged = state / "corrections" / "inputs" / f"{corrected(state, scan(7))}.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    made = prefer(checkpoint, shards, out, experiment(), judge, corrections=place)
    case_id = f"corrected-{seen.key}"
    pairs = read_pairs(out)
    assert sorted((pair.case_id, pair.chosen, pair.rejected) for pair in pairs) == [
        ("case-train", EDITED, TEXT),
        (case_id, "No effusion.", TEXT),
        (case_id, EDITED, TEXT),
    ]
    assert made.dropped == {
        "correction_of_a_scan_of_another_split": 1,
        "kept_input_of_another_spec": 1,
        "kept_input_unreadable": 1,
    }
    further = Shards.open(made.corrected)
    assert [case.id for case in further.cases("train")] == [case_id]
    for frozen in (False, True):
        settings = experiment(freeze_vision=frozen)
        trained = dpo.run(out, str(tmp_path / f"dpo-{frozen}"), settings, checkpoint)
        assert trained.training.history[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)
    job = dpo.job_of(out, str(tmp_path / "job"), experiment(), checkpoint)
    scans, column = dpo.scans_of(job)
    stream = Stream(scans, "train", ["id", column], batch_size=3, seed=None, ids=[pair.case_id for pair in pairs])
    (rows,) = list(stream)
    voxels = {"case-train": scan(1).voxels, case_id: seen.voxels}
    for name, given in zip(rows["id"], rows[column], strict=True):
        assert np.array_equal(given, voxels[name])
    # consent is withdrawn: other pairs, and none of the scan
    for draft in (new, again):
        Store(str(state), None, 30).delete_report(draft, "")
    with pytest.raises(UserError, match="corrections"):
        prefer(checkpoint, shards, out, experiment(), judge, corrections=place)
    after = prefer(checkpoint, shards, out, experiment(), judge, corrections=place, fresh=True)
    assert after.corrected == "" and not storage.exists(storage.join(out, CORRECTED))
    assert [pair.case_id for pair in read_pairs(out)] == ["case-train"]
    assert Preferences.open(out) == after


def test_tables_of_two_specs_are_not_joined(tmp_path):
    tables = [
        write_index(str(tmp_path / name), Index.of(spec, {"train": []}), [])
        for name, spec in (("a", SPEC), ("b", small(windows=[[-160, 240]]).data.spec))
    ]
    with pytest.raises(UserError, match="has spec"):
        Joined(*tables)

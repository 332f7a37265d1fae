"""What is asked is written once, with the right scan, the same whatever the batch; on Ray it is the same."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from small_runs import case, write_checkpoint, write_shards

from mu2llm.engine import writer as writer_module
from mu2llm.engine.generate import generate, parts, ring, runs
from mu2llm.engine.predictions import VARIANTS, Prediction, Request
from mu2llm.engine.reading import CaseReader
from mu2llm.engine.sampling import Decoding
from mu2llm.engine.writer import Writer
from mu2llm.errors import UserError
from mu2llm.settings.inference import InferenceConfig

QUESTION = "Write the radiology report."


def request(shards, checkpoints, batch_size=4, **changes):
    plain = Request(checkpoints, shards.uri, "test", QUESTION, Decoding(max_new_tokens=6), VARIANTS)
    return replace(plain, inference=InferenceConfig(batch_size=batch_size, actors=1), **changes)


def here(asked, shards):
    """What the tasks and actors do, in this process."""
    cases = shards.cases(asked.split)
    order = ring([each.patient for each in cases], asked.decoding.seed)
    reader = CaseReader.of(shards, asked.split, order)
    writer = Writer(asked, {each.id: each.patient for each in cases})
    tables = [
        writer(reader({"first": np.array([first]), "end": np.array([end])}))
        for first, end in runs(range(len(cases)), asked.inference.batch_size)
    ]
    return [Prediction.from_row(row) for table in tables for row in table.to_pylist()]


def test_ring_is_a_permutation_whose_neighbours_are_other_patients():
    patients = [f"p{i // 3}" for i in range(30)]
    order = ring(patients, seed=1)
    assert sorted(order) == list(range(30))
    shifted = np.roll(order, -1)
    assert all(patients[i] != patients[j] for i, j in zip(order, shifted, strict=True))
    assert list(order) != list(ring(patients, seed=2))
    assert list(order) == list(ring(patients, seed=1))


def test_each_case_gets_its_own_scan_another_patients_and_none(shards, checkpoints):
    predictions = here(request(shards, checkpoints), shards)
    patients = {each.id: each.patient for each in shards.cases("test")}
    assert len(predictions) == 2 * 10 * 3
    for prediction in predictions:
        if prediction.variant == "as_is":
            assert prediction.scan_of == prediction.case_id
        elif prediction.variant == "shuffled":
            assert patients[prediction.scan_of] != patients[prediction.case_id]
        else:
            assert prediction.scan_of == ""
    for run in checkpoints:
        scans = [p.scan_of for p in predictions if p.run == run and p.variant == "shuffled"]
        assert sorted(scans) == sorted(patients)  # a derangement: every scan once


def test_shuffled_is_what_the_other_case_sees(shards, checkpoints):
    by_key = {(p.run, p.variant, p.case_id): p for p in here(request(shards, checkpoints), shards)}
    shuffled = [p for p in by_key.values() if p.variant == "shuffled"]
    assert all(p.text == by_key[p.run, "as_is", p.scan_of].text for p in shuffled)


def test_each_scan_is_encoded_once_and_an_empty_one_written_once(shards, checkpoints, monkeypatch):
    encoded, written = [], []
    real_encode, real_write = writer_module._encode, writer_module.write

    def encode(decoder, batch):
        encoded.append(len(batch["id"]))
        return real_encode(decoder, batch)

    def count(decoder, features, mask, prompts, most):
        written.append(len(prompts))
        return real_write(decoder, features, mask, prompts, most)

    monkeypatch.setattr(writer_module, "_encode", encode)
    monkeypatch.setattr(writer_module, "write", count)
    same_vision = dict.fromkeys(("one", "two"), checkpoints["sft"])
    here(request(shards, same_vision), shards)
    assert encoded == [5, 5, 3]  # 10 scans and each batch's neighbour; not once a run
    masks = {tuple(each) for each in _masks(shards)}
    assert sum(written) == 2 * (10 + 10 + len(masks))


def _masks(shards):
    from mu2llm.cases.shards import read_rows

    return read_rows(shards.files("test"), shards.rows("test"), ["chunk_mask"], np.arange(10))["chunk_mask"].tolist()


def test_regions_ask_the_cases_own_questions(shards, checkpoints):
    asked = request(shards, {"sft": checkpoints["sft"]}, variants=("as_is",), regions=True)
    predictions = here(asked, shards)
    assert sorted(p.region or "" for p in predictions) == [""] * 10 + ["chest"] * 10
    assert {p.question for p in predictions if p.region} == {"What does the scan show in the chest?"}


def test_samples_do_not_depend_on_the_batch(shards, checkpoints):
    decoding = Decoding(max_new_tokens=6, samples=3, temperature=1.0, top_p=0.9, seed=5)
    one = {"sft": checkpoints["sft"]}
    small, large = (
        here(request(shards, one, decoding=decoding, variants=("as_is",), batch_size=size), shards) for size in (2, 10)
    )
    texts = {(p.case_id, p.index): p.text for p in small}
    assert texts == {(p.case_id, p.index): p.text for p in large}
    assert len(set(texts.values())) > 15  # of 30: an untrained model writes nearly anything
    other = replace(decoding, seed=6)
    again = here(request(shards, one, decoding=other, variants=("as_is",), batch_size=10), shards)
    assert texts != {(p.case_id, p.index): p.text for p in again}


def test_a_checkpoint_that_cannot_write_or_expects_other_scans(shards, checkpoints, tmp_path):
    contrastive = write_checkpoint(str(tmp_path / "c"), 0, "contrastive")
    with pytest.raises(UserError, match="train sft from it"):
        generate(request(shards, {"c": contrastive}))
    with pytest.raises(UserError, match="no rows in split 'train'"):
        generate(request(shards, checkpoints, split="train"))


@pytest.mark.slow
def test_on_ray_and_resumed(ray_cluster, checkpoints, tmp_path):
    shards = write_shards(str(tmp_path / "shards"), [case(i) for i in range(10)])
    asked = request(shards, checkpoints)
    seen = []
    state = str(tmp_path / "state")
    first = generate(asked, state, progress=lambda done, total: seen.append((done, total)))
    key = [(p.run, p.case_id, p.variant, p.text, p.scan_of) for p in first]
    assert sorted(key) == sorted((p.run, p.case_id, p.variant, p.text, p.scan_of) for p in here(asked, shards))
    assert [p.case_id for p in first if p.variant == "as_is" and p.run == "dpo"] == [case(i).id for i in range(10)]
    assert seen[-1] == (10, 10)
    # one finished batch is lost, and memory was too small for batches of four: only its cases are written again
    kept = sorted((tmp_path / "state" / asked.identity.digest).glob("*.parquet"))
    assert len(kept) == 3
    kept[1].unlink()
    seen.clear()
    again = generate(
        replace(asked, inference=InferenceConfig(batch_size=3, max_sequences=5)),
        state,
        progress=lambda done, total: seen.append(done),
    )
    assert sorted(seen) == [9, 10] or sorted(seen) == [7, 10]  # three and one, as they are finished
    assert again == first
    # a part is a stretch of the ring, wherever the files begin and end
    asked_again = replace(asked, inference=InferenceConfig(batch_size=7))
    in_parts = list(parts(asked_again, state, 3))
    order = ring([case(i).patient for i in range(10)], asked.decoding.seed)
    assert [{p.case_id for p in part} for part in in_parts] == [
        {case(int(i)).id for i in order[start : start + 3]} for start in range(0, 10, 3)
    ]
    assert sorted(map(repr, itertools.chain(*in_parts))) == sorted(map(repr, first))


def test_what_is_left_is_written_in_runs_of_neighbours():
    assert runs(range(10), 4) == [(0, 4), (4, 8), (8, 10)]
    assert runs([0, 1, 5, 6, 7, 9], 2) == [(0, 2), (5, 7), (7, 8), (9, 10)]
    assert runs([], 4) == []


@pytest.mark.slow
def test_what_goes_wrong_in_an_actor_is_one_line(ray_cluster, shards, checkpoints):
    with pytest.raises(UserError, match="tokens; the model takes 128"):
        generate(request(shards, checkpoints, question="word " * 200))

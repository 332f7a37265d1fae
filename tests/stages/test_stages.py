"""The stages on a shared Ray: killed and resumed, one worker and two, against stock trl, and what is refused."""

import json
import sys

import datasets
import numpy as np
import pytest
import torch
from ray import cloudpickle
from trl import DPOConfig, DPOTrainer

from mu2llm import config, storage
from mu2llm.cases import Shards, Stream, ingest, read_manifest
from mu2llm.ct import phantom
from mu2llm.errors import Failure, UserError
from mu2llm.model import load
from mu2llm.records import Checkpoint
from mu2llm.stages import contrastive, dpo, preferences, sft

pytestmark = pytest.mark.slow


def experiment(*overrides):
    return config.load("tiny", list(overrides))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mu2llm.db")
        yield folder


@pytest.fixture(scope="module")
def shards(ray_cluster, place):
    manifest = phantom.write(str(place / "scans"), 24, seed=3)
    table = read_manifest(manifest, "jsonl", str(place / "scans"), experiment().data)
    ingest(table, str(place / "shards"), experiment())
    return str(place / "shards")


@pytest.fixture(scope="module")
def vision(shards, place):
    return contrastive.run(shards, str(place / "contrastive"), experiment())


@pytest.fixture(scope="module")
def written(shards, vision, place):
    return sft.run(shards, str(place / "sft"), experiment(), vision.uri)


@pytest.fixture(scope="module")
def pairs(shards, written, place):
    preferences.prefer(written.uri, shards, str(place / "pairs"), experiment())
    return str(place / "pairs")


def losses(checkpoint):
    return [entry["loss"] for entry in checkpoint.training.history]


def test_contrast_reports_recall_and_its_chance(vision, shards):
    held_out = Shards.open(shards).count("validation")
    assert vision.training.metrics["chance_at_1"] == pytest.approx(1 / held_out)
    assert 0 <= vision.training.metrics["recall_at_1"] <= vision.training.metrics["recall_at_5"] <= 1


def test_a_finished_stage_is_not_done_again(written, vision, shards):
    again = sft.run(shards, written.uri, experiment(), vision.uri)
    assert again.training == written.training
    with pytest.raises(UserError, match="another configuration"):
        sft.run(shards, written.uri, experiment("sft.learning_rate=0.5"), vision.uri)


def test_the_checkpoint_folder_holds_the_checkpoint_and_nothing_else(written):
    names = {info.base_name for info in storage.list_files(written.uri)}
    assert {"mu2llm.json", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)


def test_the_same_seed_gives_the_same_losses(written, vision, shards, place):
    other = sft.run(shards, str(place / "sft-again"), experiment(), vision.uri)
    assert losses(other) == losses(written)


def test_two_workers_learn_what_one_does(written, vision, shards, place):
    two = sft.run(shards, str(place / "sft-two"), experiment("sft.workers=2"), vision.uri)
    assert losses(two) == pytest.approx(losses(written), abs=1e-4)


def test_a_killed_worker_goes_on_at_the_same_step(written, vision, shards, place, monkeypatch):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    marker = place / "killed"
    monkeypatch.setattr(sft, "loop", KilledOnce(str(marker), after=5))
    resumed = sft.run(shards, str(place / "sft-killed"), experiment(), vision.uri)
    assert marker.exists()
    assert resumed.training.resumed_from_step == 3  # it saves every three steps
    assert resumed.training.steps == written.training.steps
    assert resumed.training.cases_seen == written.training.cases_seen
    assert losses(resumed) == pytest.approx(losses(written), abs=1e-5)


class KilledOnce:
    """The SFT loop, whose process dies once, without a word, when it asks for a batch after so many."""

    def __init__(self, marker, after):
        self.marker, self.after = marker, after

    def __call__(self, job, resume):
        import os
        import signal
        from pathlib import Path

        from mu2llm.stages import runner
        from mu2llm.stages.sft import loop

        given = runner.Batches.__iter__

        def deadly(batches):
            for number, batch in enumerate(given(batches)):
                if number == self.after and not Path(self.marker).exists():
                    Path(self.marker).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        runner.Batches.__iter__ = deadly
        loop(job, resume)


def test_pairs_are_kept_with_their_judge_and_made_once(pairs, written, shards):
    found = preferences.Preferences.open(pairs)
    assert found.judge.startswith("rules")
    assert 0 < found.pairs <= found.cases
    for pair in preferences.read_pairs(pairs):
        assert pair.chosen_score - pair.rejected_score >= experiment().preferences.margin
    again = preferences.prefer(written.uri, shards, pairs, experiment())
    assert again == found


def test_dpo_prefers_what_was_chosen(pairs, place):
    trained = dpo.run(pairs, str(place / "dpo"), experiment("dpo.learning_rate=0.001", "dpo.epochs=6"))
    first, last = trained.training.history[0], trained.training.history[-1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-3)  # policy = reference
    assert last["rewards/margins"] > first["rewards/margins"]
    assert trained.lineage.judge == preferences.Preferences.open(pairs).judge


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "robust", "apo_zero"])
def test_dpo_agrees_with_stock_trl_and_encodes_each_scan_once(loss, pairs, written, shards, monkeypatch, tmp_path):
    settings = experiment(f"dpo.loss=[{loss}]", "dpo.label_smoothing=0.1").dpo
    (policy, processor), (reference, _) = load(written.uri), load(written.uri)
    with torch.no_grad():  # so that policy and reference differ
        policy.lm_head.weight += 0.02 * torch.randn(policy.lm_head.weight.shape, generator=torch.manual_seed(1))
    examples = dpo.Examples(preferences.read_pairs(pairs), None, processor)
    rows = scans_of(pairs, shards)
    batch = examples.collate(rows, "voxels")
    batch.pop("case_ids")
    arguments = {**dpo.loss_arguments(settings), "output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
    common = {
        "train_dataset": datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        "data_collator": examples.collator,
        "processing_class": processor.tokenizer,
    }
    stock_arguments = DPOConfig(**{**arguments, "precompute_ref_log_probs": False, "bf16": False})
    stock = DPOTrainer(model=policy, ref_model=reference, args=stock_arguments, **common)
    ours = dpo.Mu2DPOTrainer(model=policy, args=DPOConfig(**arguments, bf16=False), **common)
    chosen, rejected = dpo.sequence_logps(reference, batch).chunk(2)
    encoded: list[int] = []
    original = policy.model.encode_vision
    monkeypatch.setattr(policy.model, "encode_vision", lambda v, m=None: encoded.append(len(v)) or original(v, m))
    with torch.no_grad():
        expected = float(stock.compute_loss(policy, dict(batch)))
        encoded.clear()
        given = float(ours.compute_loss(policy, {**batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}))
    assert given == pytest.approx(expected, abs=1e-5)
    assert encoded == [len(rows["id"])]  # one pass over B scans for 2B sequences, none for the reference


def scans_of(pairs, shards):
    """The first four pairs' scans, as the stream gives them."""
    ids = [pair.case_id for pair in preferences.read_pairs(pairs)][:4]
    split = preferences.Preferences.open(pairs).split
    columns = ["id", "voxels", "chunk_mask"]
    return next(iter(Stream(Shards.open(shards), split, columns, batch_size=4, seed=None, ids=ids)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda place, shards: sft.run(str(place / "nothing"), str(place / "x"), experiment()), "no finished shards"),
        (lambda place, shards: sft.run(shards, str(place / "x"), experiment(), str(place)), "not a checkpoint"),
        (lambda place, shards: dpo.run(shards, str(place / "x"), experiment()), "no preference pairs"),
        (
            lambda place, shards: contrastive.run(
                shards, str(place / "x"), experiment("contrastive.cpus_per_worker=999")
            ),
            "ask for fewer workers",
        ),
        (
            lambda place, shards: contrastive.run(shards, str(place / "x"), experiment("contrastive.workers=3")),
            "does not divide among 3 workers",
        ),
        (
            lambda place, shards: contrastive.run(shards, str(place / "x"), experiment("data.spec.grid=[32,32,32]")),
            "name the preset that it was ingested with",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(call, says, shards, place):
    with pytest.raises(UserError, match=says):
        call(place, shards)
    assert not (place / "x").exists()


def test_a_loss_that_is_not_finite_stops_and_names_the_cases(vision, shards, place):
    out = str(place / "nan")
    with pytest.raises(Failure, match="the loss is"):
        sft.run(shards, out, experiment("sft.learning_rate=1e30", "sft.max_grad_norm=1e30"), vision.uri)
    told = json.loads(storage.read_bytes(f"{out}.state/stopped.json"))
    assert told["case_ids"]
    assert Checkpoint.FILE not in [info.base_name for info in storage.list_files(out)]

"""The stages on a shared Ray: killed and resumed, one worker and two, against stock trl, and what is refused."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from trl import DPOConfig, DPOTrainer

from mu2llm import config, storage, tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases import Shards, Stream, ingest, read_manifest
from mu2llm.ct import phantom
from mu2llm.engine.features import read_scans
from mu2llm.engine.loading import load_encoder
from mu2llm.engine.log_probabilities import sequence_logps
from mu2llm.errors import Failure, UserError
from mu2llm.model import Mu2ForContrastive, load
from mu2llm.records import Checkpoint, Correction
from mu2llm.serving import decoder
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


def test_two_workers_contrast_as_one_does(vision, shards, place):
    """Batch norm and running means over the whole batch, negatives gathered with the gradient."""
    two = contrastive.run(shards, str(place / "contrastive-two"), experiment("contrastive.workers=2"))
    assert losses(two) == pytest.approx(losses(vision), abs=1e-4)


def test_sharded_workers_learn_what_one_does_also_after_a_kill(vision, shards, place, monkeypatch):
    """No worker has the whole model: it is gathered for every checkpoint, and shared out again where a run goes on."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    plain = sft.run(shards, str(place / "whole"), experiment("sft.alignment=0", "sft.workers=0"), vision.uri)
    monkeypatch.setattr(sft, "loop", Sharded(str(place / "killed-sharded"), after=5))
    given = experiment("sft.alignment=0", "sft.workers=2", "sft.fsdp=full_shard")
    sharded = sft.run(shards, str(place / "sharded"), given, vision.uri)
    assert sharded.training.resumed_from_step == 3
    assert losses(sharded) == pytest.approx(losses(plain), abs=1e-4)
    ours, theirs = (load(each.uri)[0].state_dict() for each in (sharded, plain))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-3, rtol=1e-3)


def test_elastic_training_starts_with_the_workers_that_fit(vision, shards, place):
    """Of one to two workers with five CPUs each, the cluster of eight has room for one."""
    told = []
    settings = ["contrastive.workers=[1,2]", "contrastive.cpus_per_worker=5", "contrastive.max_steps=4"]
    one = contrastive.run(shards, str(place / "elastic"), experiment(*settings), progress=told.append)
    assert one.training.steps == 4
    assert {numbers["workers"] for numbers in told if "workers" in numbers} == {1}


def test_a_text_encoder_is_trained_and_kept(shards, place):
    settings = ["model.text_encoder=small", "contrastive.train_text_encoder=true", "contrastive.positives=sentence"]
    trained = contrastive.run(shards, str(place / "text"), experiment("contrastive.workers=0", *settings))
    with storage.local_copy(trained.uri) as folder:
        model = Mu2ForContrastive.from_pretrained(folder)
    assert model.text_encoder is not None
    assert losses(trained)[-1] < losses(trained)[0]
    assert 0 <= trained.training.metrics["recall_at_1"] <= 1


@pytest.fixture(scope="module")
def validated(vision, shards, place):
    """SFT with vision thawed half-way, batches of alike lengths, validation beside it, and a node that is to go."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    told = []
    settings = [
        *("sft.cache_vision=false", "sft.thaw_vision=0.5", "sft.alignment=0", "sft.group_by_length=true"),
        *("sft.validation.steps=5", "sft.validation.reports=2", "sft.validation.publish=best", "sft.save_steps=1000"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "loop", Preempted(after=3))
        checkpoint = sft.run(shards, str(place / "validated"), experiment(*settings), vision.uri, told.append)
    return checkpoint, told


class Preempted:
    """The SFT loop on a node that is to be taken away, which is known after so many steps."""

    def __init__(self, after):
        self.after = after

    def __call__(self, job, resume):
        import ray.train

        from mu2llm.stages.sft import loop

        calls = []
        ray.train.get_preemption_info = lambda: calls.append(1) or (object() if len(calls) >= self.after else None)
        loop(job, resume)


def test_checkpoints_are_validated_beside_the_training(validated):
    checkpoint, _ = validated
    steps = [entry["step"] for entry in checkpoint.training.validation]
    assert steps == list(range(5, checkpoint.training.steps + 1, 5))
    for entry in checkpoint.training.validation:
        assert entry["validation/loss"] > 0
        assert "validation/green" in entry or "validation/finding_f1" in entry
    run = tracking.find(checkpoint.uri)
    assert [step for step, _ in tracking.history(run, "validation/loss")] == steps


def test_the_best_checkpoint_is_published(validated, shards):
    checkpoint, _ = validated
    best = min(checkpoint.training.validation, key=lambda entry: entry["validation/loss"])
    assert checkpoint.training.metrics["validation/step"] == best["step"]
    model, processor = load(checkpoint.uri)
    cases = Shards.open(shards).cases("validation")
    features, mask = read_scans(model, Shards.open(shards), "validation", np.arange(len(cases)))
    asked = [experiment().evaluation.question] * len(cases)
    inputs = processor.encode(asked, [case.report for case in cases])
    with torch.no_grad():
        loss = float(model(**inputs, vision_features=features, chunk_mask=mask).loss)
    assert loss == pytest.approx(best["validation/loss"], abs=1e-4)


def test_vision_is_thawed_on_the_way(validated, vision, written):
    def weights(uri):
        encoder = load_encoder(uri)
        tower = getattr(encoder, "vision", None) or encoder.model.vision
        return {name: p.detach() for name, p in tower.named_parameters()}

    before, frozen, thawed = (weights(each) for each in (vision.uri, written.uri, validated[0].uri))
    assert all(torch.equal(before[name], frozen[name]) for name in before)
    assert any(not torch.equal(before[name], thawed[name]) for name in before)


def test_a_notice_of_preemption_saves_a_checkpoint(validated):
    saved = [int(numbers["saved_step"]) for numbers in validated[1] if "saved_step" in numbers]
    assert saved[0] == 3  # neither a step to save nor one to validate
    assert saved.count(3) == 1


def test_a_killed_driver_goes_on_at_the_same_step(vision, shards, place):
    """`mu2llm train sft`, killed without a word when it has saved, and the same command again."""
    longer, out = ["sft.epochs=40", "sft.save_steps=10", "sft.log_steps=5"], str(place / "driver")
    command = [Path(sys.executable).parent / "mu2llm", "train", "sft", "--preset", "tiny", "--data", shards]
    command += ["--out", out, "--init", vision.uri, "--json", *(part for each in longer for part in ("--set", each))]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    undisturbed = sft.run(shards, str(place / "undisturbed"), experiment("sft.workers=0", *longer), vision.uri)
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 250
    while not storage.exists(f"{out}.state/snapshot.json"):
        assert first.poll() is None and time.monotonic() < deadline, first.stderr.read()
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert not storage.exists(f"{out}/{Checkpoint.FILE}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert 0 < told["resumed_from_step"] < told["steps"]
    assert told["steps"] == undisturbed.training.steps
    assert told["cases_seen"] == undisturbed.training.cases_seen
    assert losses(open_checkpoint(out)) == pytest.approx(losses(undisturbed), abs=1e-4)


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

        from mu2llm.stages.sft import loop
        from mu2llm.stages.worker import Batches

        given = Batches.__iter__

        def deadly(batches):
            for number, batch in enumerate(given(batches)):
                if number == self.after and not Path(self.marker).exists():
                    Path(self.marker).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        Batches.__iter__ = deadly
        loop(job, resume)


class Sharded(KilledOnce):
    """The same, and it fails where HF and accelerate pass over the sharding."""

    def __call__(self, job, resume):
        from torch.distributed.fsdp import FSDPModule

        from mu2llm.stages import sft

        given = sft.train

        def watched(trainer, *more):
            given(trainer, *more)
            assert isinstance(trainer.model, FSDPModule), "the model was trained whole"

        sft.train = watched
        super().__call__(job, resume)


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
    assert first["kl"] == pytest.approx(0, abs=1e-3)
    assert last["kl"] != first["kl"]
    assert first["lengths/chosen"] > 0 and first["lengths/rejected"] > 0
    assert 0 <= last["rewards/accuracies"] <= 1
    assert 5 < last["epoch"] <= 6


def test_two_workers_prefer_what_one_does(pairs, place):
    one = dpo.run(pairs, str(place / "dpo-alone"), experiment("dpo.workers=0"))
    two = dpo.run(pairs, str(place / "dpo-two"), experiment("dpo.workers=2"))
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    for name in ("rewards/margins", "kl", "lengths/chosen"):
        ours, theirs = ([entry[name] for entry in each.training.history] for each in (two, one))
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        ("sigmoid", []),
        ("ipo", []),
        ("robust", ["dpo.label_smoothing=0.1"]),
        ("apo_zero", []),
        ("sigmoid+sft", ["dpo.loss_weights=[1,0.2]"]),
        ("sigmoid", ["dpo.ld_alpha=0.5"]),
    ],
)
def test_dpo_agrees_with_stock_trl_and_encodes_each_scan_once(
    loss, more, pairs, written, shards, monkeypatch, tmp_path
):
    settings = experiment(f"dpo.loss={loss}", *more).dpo
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
    chosen, rejected = sequence_logps(reference, batch, settings.ld_alpha).chunk(2)
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
            lambda place, shards: contrastive.run(
                shards, str(place / "x"), experiment("model.vision.hidden_size=64"), str(place / "contrastive")
            ),
            "model.vision.hidden_size is 32 there, 64 here",
        ),
        (
            lambda place, shards: sft.run(
                shards, str(place / "x"), experiment("model.tokenizer.queries=8"), str(place / "sft")
            ),
            "model.tokenizer.queries is 4 there, 8 here",
        ),
        (lambda place, shards: experiment("dpo.beta=0"), "dpo.beta"),
        (
            lambda place, shards: contrastive.run(shards, str(place / "x"), experiment("data.spec.grid=[32,32,32]")),
            "name the preset that it was ingested with",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(call, says, shards, written, place):
    with pytest.raises(UserError, match=says):
        call(place, shards)
    assert not (place / "x").exists()


def test_pairs_of_cases_that_are_not_there_are_refused(pairs, written, shards):
    found, made = preferences.Preferences.open(pairs), preferences.read_pairs(pairs)
    strange = made[0].model_copy(update={"case_id": "nobody"})
    with pytest.raises(UserError, match=r"1 cases of the pairs are not in .*such as nobody"):
        dpo.check(found, Shards.open(shards), [*made, strange], written.uri)


def test_corrections_are_pairs_of_their_own(written, shards, place):
    cases = Shards.open(shards).cases("train")

    def correction(i, volume, chosen, rejected="There is no finding."):
        return Correction(
            **{"id": str(i), "scan_sha256": "0" * 64, "volume": volume, "question": "Write the report."},
            **{"chosen": chosen, "rejected": rejected, "time": "2026-01-01T00:00:00Z"},
        )

    given = [
        correction(0, cases[2].volume, "There is a nodule."),
        correction(1, cases[3].volume, "There is no finding."),
        correction(2, None, "There is a nodule."),
        correction(3, "s3://elsewhere/scan.nii.gz", "There is a nodule."),
    ]
    file = place / "corrections.jsonl"
    file.write_text("".join(each.model_dump_json() + "\n" for each in given))
    alone = experiment("preferences.max_cases=0")
    made = preferences.prefer(written.uri, shards, str(place / "corrected"), alone, corrections=str(file))
    (pair,) = preferences.read_pairs(str(place / "corrected"))
    assert (pair.case_id, pair.origin, pair.judge) == (cases[2].id, "human", "human")
    assert (pair.chosen, pair.rejected, pair.prompt) == (given[0].chosen, given[0].rejected, given[0].question)
    assert sum(made.dropped.values()) == 3
    dpo.check(made, Shards.open(shards), [pair], written.uri)
    file.write_text(given[2].model_dump_json())
    with pytest.raises(UserError, match="none of 1 corrections makes a pair: 1 correction of a scan not in the split"):
        preferences.prefer(written.uri, shards, str(place / "none"), alone, corrections=str(file))


def test_a_correction_of_an_uploaded_scan_finds_its_case(shards):
    """The page uploads, so there is no URI: what the model saw of the scan tells which case it is."""
    opened = Shards.open(shards)
    case = opened.cases("train")[3]
    scan = decoder.read(decoder.Reading([storage.read_bytes(case.volume)], opened.spec), max_slices=2500)
    given = {"scan_sha256": "0" * 64, "question": "?", "chosen": "a", "rejected": "b", "time": "2026-01-01T00:00:00Z"}
    given |= {"input_key": scan.key}
    same = Correction(id="same", spec_hash=opened.spec.hash, **given)
    other = Correction(id="other", spec_hash="of another spec", **given)
    assert preferences.case_of_scan([same, other], opened, "train") == {"same": case.id}


def test_a_loss_that_is_not_finite_stops_and_names_the_cases(vision, shards, place):
    out = str(place / "nan")
    with pytest.raises(Failure, match="the loss is"):
        sft.run(shards, out, experiment("sft.learning_rate=1e30", "sft.max_grad_norm=1e30"), vision.uri)
    told = json.loads(storage.read_bytes(f"{out}.state/stopped.json"))
    assert told["case_ids"]
    assert Checkpoint.FILE not in [info.base_name for info in storage.list_files(out)]

"""The stages: trained here, in gloo processes and by Ray Train, to the same numbers; resumed; refused.

What is compared is trained in this process (`here`). Ray Train runs are few, as each starts ten processes.
"""

import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import gloo
import numpy as np
import pytest
import ray
import torch
from hosts import Node
from ray import cloudpickle
from trl import DPOConfig, DPOTrainer

from mu2llm import cli, config, storage, tracking, weights
from mu2llm.artefacts import describe, open_checkpoint
from mu2llm.cases import Shards, Stream
from mu2llm.engine.features import read_scans
from mu2llm.engine.loading import load_encoder
from mu2llm.engine.log_probabilities import sequence_logps
from mu2llm.errors import Failure, UserError
from mu2llm.evaluation.probe import probe
from mu2llm.model import Mu2ForContrastive, build_processor, load, load_contrastive, load_processor
from mu2llm.records import Checkpoint, Correction, Estimate
from mu2llm.serving import decoder
from mu2llm.stages import contrastive, corrections, dpo, launch, online, preferences, sft
from mu2llm.stages.job import new_job
from mu2llm.stages.texts import TextBank

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("actors_here")]


def experiment(*overrides):
    return config.load("tiny", list(overrides))


def here(*overrides):
    """The same, trained in this process."""
    return experiment("contrastive.workers=0", "sft.workers=0", "dpo.workers=0", *overrides)


@pytest.fixture(scope="module")
def vision(shards, place):
    return contrastive.run(shards, str(place / "contrastive"), here())


@pytest.fixture(scope="module")
def written(shards, vision, place):
    return sft.run(shards, str(place / "sft"), here(), vision.uri)


@pytest.fixture(scope="module")
def pairs(shards, written, place):
    preferences.prefer(written.uri, shards, str(place / "pairs"), experiment())
    return str(place / "pairs")


def losses(checkpoint):
    return [entry["loss"] for entry in checkpoint.training.history]


def test_contrast_reports_recall_of_what_it_publishes(vision, shards):
    """Against the definition, scan by scan: the places of a scan's own report among all by score, ties shared."""
    opened, found = Shards.open(shards), vision.training.metrics
    reports = [case.report for case in opened.cases("validation")]
    model = Mu2ForContrastive.from_pretrained(vision.uri).eval()
    encoder = weights.text_encoder(experiment().model.text_encoder, [c.report for c in opened.cases("train")])
    bank = TextBank(encoder, experiment().contrastive.positives, [c.report for c in opened.cases("train")], 0)
    distinct = sorted({text for report in reports for text in bank.split(report)})
    rows = next(iter(Stream(opened, "validation", ["voxels", "chunk_mask"], batch_size=len(reports), seed=None)))
    voxels, mask = (torch.as_tensor(np.asarray(rows[name])) for name in ("voxels", "chunk_mask"))
    with torch.no_grad():
        chances = model.score(voxels, mask, model.embed_texts(**bank.inputs(distinct))).sigmoid()
    recalled = {1: [], 5: []}
    for scan in range(len(reports)):
        scores = [
            sum(math.log(p if text in bank.split(report) else 1 - p) for text, p in zip(distinct, of_scan, strict=True))
            for report in reports
            for of_scan in [chances[:, scan].tolist()]
        ]
        better = sum(score > scores[scan] + 1e-5 for score in scores)
        equal = sum(abs(score - scores[scan]) <= 1e-5 for score in scores)
        for k, found_at in recalled.items():
            found_at.append(min(1, max(0, k - better) / equal))
    assert found["chance_at_1"] == pytest.approx(1 / len(reports)) and found["recall_n"] == len(reports)
    for k, found_at in recalled.items():
        assert found[f"recall_at_{k}"] == pytest.approx(np.mean(found_at), abs=1e-6)


class Tells:
    """A model that scores a scan's own report, the next one's, or none above the others: scans are numbered."""

    def __init__(self, offset):
        self.offset, self.device, self.seen = offset, torch.device("cpu"), 0

    def embed_texts(self, numbers):
        return numbers

    def encode_vision(self, voxels, mask):
        self.seen += len(voxels)
        return torch.arange(self.seen - len(voxels), self.seen)

    def score(self, voxels, mask, embeddings, scans):
        if self.offset is None:
            return torch.zeros(len(embeddings), len(scans))
        return 9.0 * (embeddings[:, None] == (scans + self.offset) % self.most) - 4.5


@pytest.mark.parametrize("at_a_time", [512, 2])
@pytest.mark.parametrize(("offset", "first"), [(0, 1.0), (1, 0.0), (None, None)])
def test_recall_tells_who_knows_from_who_guesses(shards, monkeypatch, offset, first, at_a_time):
    opened = Shards.open(shards)
    monkeypatch.setattr(contrastive, "SCANS", at_a_time)
    monkeypatch.setattr(contrastive, "TEXTS", at_a_time)
    cases = [case.model_copy(update={"report": f"{i:03d}"}) for i, case in enumerate(opened.cases("validation"))]
    monkeypatch.setattr(Shards, "cases", lambda self, split: cases)
    texts = SimpleNamespace(
        split=lambda report: [report],
        inputs=lambda distinct: {"numbers": torch.tensor([int(text) for text in distinct])},
    )
    Tells.most = len(cases)
    found = contrastive.recall(Tells(offset), opened, texts)
    chance = {k: min(1.0, k / len(cases)) for k in (1, 5)}
    assert found["recall_at_1"] == pytest.approx(chance[1] if first is None else first)
    assert found["recall_at_5"] == pytest.approx(chance[5] if first is None else 1.0)


def test_findings_that_the_head_does_not_tell_are_named(caplog):
    has = torch.zeros(4, 20, dtype=torch.bool)
    has[0, :8] = has[1, 5:11] = has[2, :5] = has[3, :4] = True  # the last: too few to say anything
    logits = torch.where(has, 2.0, -2.0)
    logits[1], logits[3] = -2.0, -2.0
    logits[2, 2:5], logits[2, 9] = -2.0, 2.0
    names = ["right pleural effusion", "right renal cyst", "gallstones", "emphysema"]
    f1 = contrastive.findings_f1(names, has, logits)
    assert f1 == {"f1/right pleural effusion": 1.0, "f1/right renal cyst": 0.0, "f1/gallstones": 0.5}
    trained = SimpleNamespace(uri="c", training=SimpleNamespace(metrics={"temperature": 0.1, **f1}))
    contrastive.warn_of_missed_findings(trained)
    (line,) = caplog.messages
    assert "of the 3 findings" in line and "does not tell right renal cyst (F1 0.00); " in line
    caplog.clear()
    trained.training.metrics = contrastive.findings_f1(names, has, torch.where(has, 2.0, -2.0))
    contrastive.warn_of_missed_findings(trained)
    assert not caplog.messages


def test_a_checkpoint_is_safe_before_its_recall_is_measured(vision, shards, place, monkeypatch):
    """What fails or is killed in the measuring is published by the next attempt, without training again."""
    out = str(place / "unmeasured")

    def no_memory(*_):
        raise MemoryError("too many reports")

    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "recall", no_memory)
        with pytest.raises(MemoryError):
            contrastive.run(shards, out, here())
    assert storage.exists(f"{out}.state/finished.json") and not storage.exists(f"{out}/{Checkpoint.FILE}")
    monkeypatch.setattr(contrastive.ContrastiveTrainer, "train", no_memory)
    published = contrastive.run(shards, out, here())
    assert published.lineage.weights == vision.lineage.weights and "recall_n" not in published.training.metrics
    assert vision.training.metrics["recall_n"] > 0


def test_a_contrastive_checkpoint_is_a_clip(vision, shards):
    """Its texts' encoder, whitening and temperature are in it: it scores what training scored; and its probe."""
    model, encoder = load_contrastive(vision.uri)
    opened, settings = Shards.open(shards), experiment()
    reports = [case.report for case in opened.cases("train")]
    texts = TextBank(encoder, settings.contrastive.positives, reports, settings.seed)
    embedded = model.whiten(encoder.embed(texts.distinct))
    torch.testing.assert_close(embedded, texts.inputs(texts.distinct)["text_embeddings"], atol=1e-4, rtol=1e-4)
    assert float(model.head.temperature) == pytest.approx(vision.training.metrics["temperature"])
    found = probe(vision.uri, shards)
    assert found.n == {split: opened.count(split) for split in ("train", "validation", "test")}
    assert 1.5 < found.effective_rank <= found.n["test"]  # 1 is a collapse: one vector for all
    scored = [label for label in found.labels.values() if label.auroc]
    assert scored and all(0 < label.positives < found.n["test"] == label.auroc.n for label in scored)
    for label in scored:
        assert 0 <= label.zero_shot_auroc.value <= 1 and label.zero_shot_auroc.n == label.auroc.n


def test_a_finished_stage_is_not_done_again(written, vision, shards):
    again = sft.run(shards, written.uri, experiment(), vision.uri)
    assert again.training == written.training
    with pytest.raises(UserError, match="another configuration"):
        sft.run(shards, written.uri, experiment("sft.learning_rate=0.5"), vision.uri)


def test_another_language_model_starts_with_the_vision_and_tokenizer_that_were_trained(written, shards, place):
    other = ["model.small.hidden_size=48", "model.small.num_layers=2", "model.tokenizer.width=32"]
    other += [f"model.tokenizer.weights={written.uri}", "model.tokenizer.output_scale=embedding_rms"]
    rates = ["sft.learning_rates.fresh=1e-12", "sft.learning_rate=0.01"]
    trained = sft.run(shards, str(place / "another"), here(*other, *rates))
    assert losses(trained)[-1] < losses(trained)[0]
    (model, processor), (before, _) = load(trained.uri), load(written.uri)
    ours, theirs = model.model.state_dict(), before.model.state_dict()
    learned = [name for name, _ in before.model.named_parameters() if name.startswith(("projector.", "mu2_tokenizer."))]
    assert learned and all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in learned)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name.startswith("vision."))
    inputs = processor.encode([experiment().evaluation.question])
    features, mask = read_scans(model, Shards.open(shards), "validation", np.arange(1))
    assert model.generate(**inputs, vision_features=features, chunk_mask=mask, max_new_tokens=3).shape[0] == 1
    with pytest.raises(UserError, match="both bring a vision"):
        sft.run(shards, str(place / "x"), here(*other), written.uri)


def test_a_diagnostic_prior_comes_from_contrast_and_goes_on_to_dpo(vision, shards, place):
    settings = here("model.tokenizer.prior=3", "dpo.epochs=1")
    trained = sft.run(shards, str(place / "told"), settings, vision.uri)
    (model, processor), (seen, _) = load(trained.uri), load_contrastive(vision.uri)
    assert len(model.config.findings) == 3 and processor.queries == model.config.visual_tokens == 7
    assert losses(trained)[-1] < losses(trained)[0]
    assert sft.finding_kind(vision.uri) == "placed_finding" == vision.experiment["contrastive"]["positives"]
    assert sft.finding_kind(trained.uri) == sft.finding_kind(None) == "finding"
    without = vision.model_copy(update={"uri": str(place / "without")}, deep=True)
    without.experiment["contrastive"] |= {"positives": "finding"}
    describe(without)
    assert sft.finding_kind(without.uri) == "finding"
    for name, value in seen.head.state_dict().items():
        assert torch.equal(model.model.prior.state_dict()[f"head.{name}"], value)
    preferences.prefer(trained.uri, shards, str(place / "told-pairs"), settings)
    aligned = dpo.run(str(place / "told-pairs"), str(place / "told-dpo"), settings)
    assert load(aligned.uri)[0].config.findings == model.config.findings
    assert aligned.training.history[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(UserError, match=r"model\.tokenizer\.prior is 3 there, 0 here"):
        sft.run(shards, str(place / "y"), here(), trained.uri)


def test_the_checkpoint_folder_holds_the_checkpoint_and_nothing_else(written):
    names = {info.base_name for info in storage.list_files(written.uri)}
    assert {"mu2llm.json", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)


@pytest.fixture
def in_gloo(monkeypatch):
    """Stages train in gloo processes of their own."""
    monkeypatch.setattr(launch, "run", gloo.train)


def test_the_same_seed_gives_the_same_losses_also_in_another_process(written, vision, shards, place, in_gloo):
    other = sft.run(shards, str(place / "sft-again"), experiment(), vision.uri)
    assert losses(other) == losses(written)


def test_two_workers_learn_what_one_does(written, vision, shards, place, in_gloo):
    two = sft.run(shards, str(place / "sft-two"), experiment("sft.workers=2"), vision.uri)
    assert losses(two) == pytest.approx(losses(written), abs=1e-4)


ALIGNED_FIRST = ["sft.alignment_first=0.5", "sft.learning_rates.fresh=0.001"]
THAWED = [*ALIGNED_FIRST, "sft.cache_vision=false", "sft.thaw_vision=0.75"]


@pytest.mark.parametrize("settings", [ALIGNED_FIRST, THAWED], ids=["frozen", "thawed"])
def test_two_workers_align_first_as_one_does(settings, vision, shards, place, in_gloo):
    """The alignment's head is reached through the model's forward: its gradient is of all workers' scans."""
    name = f"aligned-{len(settings)}"
    one = sft.run(shards, str(place / name), here(*settings), vision.uri)
    two = sft.run(shards, str(place / f"{name}-two"), experiment(*settings, "sft.workers=2"), vision.uri)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)


def test_two_workers_accumulate_what_one_does(written, vision, shards, place, in_gloo):
    """Two steps' tokens are averaged as one's; with standardised tokens it is not the larger batch that is learned."""
    settings = ["sft.batch_size=2", "sft.accumulation=2"]
    one = sft.run(shards, str(place / "sft-accumulated"), here(*settings), vision.uri)
    two = sft.run(shards, str(place / "sft-two-accumulated"), experiment(*settings, "sft.workers=2"), vision.uri)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert one.training.cases_seen == two.training.cases_seen == written.training.cases_seen


def test_bfloat16_learns_nearly_the_same(written, vision, shards, place, in_gloo):
    given = experiment("sft.workers=2", "sft.precision=bf16")
    rounded = losses(sft.run(shards, str(place / "sft-bf16"), given, vision.uri))
    assert rounded == pytest.approx(losses(written), abs=0.05)
    assert max(abs(a - b) for a, b in zip(rounded, losses(written), strict=True)) > 1e-4


def test_two_workers_contrast_as_one_does(vision, shards, place, in_gloo):
    """Batch norm and running means over the whole batch, negatives gathered with the gradient."""
    two = contrastive.run(shards, str(place / "contrastive-two"), experiment("contrastive.workers=2"))
    assert losses(two) == pytest.approx(losses(vision), abs=1e-4)


def test_sharded_workers_learn_what_one_does_also_after_a_kill(vision, shards, place, in_gloo, monkeypatch):
    """No worker has the whole model: it is gathered for every checkpoint, and shared out again where a run goes on.

    The alignment comes first, and vision is thawed on the way. Saved by the clock, which all workers read at the same
    steps."""
    plain = sft.run(shards, str(place / "whole"), here(*THAWED), vision.uri)
    by_the_clock = ["sft.save_steps=null", "sft.save_minutes=1e-6", "sft.check_steps=3"]
    given = experiment(*THAWED, "sft.workers=2", "sft.fsdp=full_shard", *by_the_clock)
    monkeypatch.setattr(sft, "loop", Sharded(str(place / "killed-sharded"), after=5))
    sharded = sft.run(shards, str(place / "sharded"), given, vision.uri)
    assert sharded.training.resumed_from_step == 3
    assert losses(sharded) == pytest.approx(losses(plain), abs=1e-4)
    ours, theirs = (load(each.uri)[0].state_dict() for each in (sharded, plain))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-3, rtol=1e-3)


class KilledOnce:
    """A stage's loop, whose process dies once, without a word, when it asks for a batch after so many.

    It waits for `saved` first, if that is given: the file that says that a checkpoint is where a resume finds it.
    """

    def __init__(self, marker, after, saved=None):
        self.marker, self.after, self.saved = Path(marker), after, saved

    def __call__(self, job, resume):
        from mu2llm.stages.sft import loop
        from mu2llm.stages.worker import Batches

        given = Batches.__iter__

        def deadly(batches):
            for number, batch in enumerate(given(batches)):
                if number == self.after and not self.marker.exists():
                    while self.saved and not Path(self.saved).exists():
                        time.sleep(0.05)
                    self.marker.touch()
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


def test_elastic_training_grows_with_the_cluster(vision, shards, place, monkeypatch):
    """Of one to two workers with five CPUs each the cluster of eight has room for one, until another node joins."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    monkeypatch.setattr(contrastive, "loop", AloneFor(steps=4))
    elastic = functools.partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=1)
    monkeypatch.setattr(ray.train, "ScalingConfig", elastic)
    gcs = ray.get_runtime_context().gcs_address
    told, nodes = [], []

    def follow(numbers):
        told.append(numbers)
        if "saved_step" in numbers and not nodes:
            nodes.append(Node([f"--address={gcs}"], 5, dict(os.environ), gcs.split(":")[0]))

    settings = ["contrastive.workers=[1,2]", "contrastive.cpus_per_worker=5"]
    try:
        grown = contrastive.run(shards, str(place / "elastic"), experiment(*settings), progress=follow)
    finally:
        for node in nodes:
            node.kill()
    workers = {numbers["step"]: numbers["workers"] for numbers in told if "workers" in numbers}
    assert workers == {step: 1 if step <= 3 else 2 for step in range(1, grown.training.steps + 1)}
    assert grown.training.resumed_from_step >= 3  # a worker that a loaded machine lost started once more, later
    assert losses(grown) == pytest.approx(losses(vision), abs=1e-3)


class AloneFor:
    """The contrastive loop, which alone gets no further than so many steps: it waits to be joined by another."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, job, resume):
        from mu2llm.stages.contrastive import loop
        from mu2llm.stages.worker import Batches, current_worker

        given = Batches.__iter__

        def waiting(batches):
            for number, batch in enumerate(given(batches)):
                while number == self.steps and current_worker.get().world == 1:
                    time.sleep(0.05)  # until Ray Train ends this worker
                yield batch

        Batches.__iter__ = waiting
        loop(job, resume)


def test_a_text_encoder_is_trained_and_kept(shards, place):
    settings = ["model.text_encoder=small", "contrastive.train_text_encoder=true", "contrastive.positives=sentence"]
    trained = contrastive.run(shards, str(place / "text"), here(*settings))
    asleep = contrastive.run(shards, str(place / "text-asleep"), here(*settings, "contrastive.learning_rate=1e-12"))
    after, before = (
        dict(Mu2ForContrastive.from_pretrained(each.uri).text_encoder.named_parameters()) for each in (trained, asleep)
    )
    moved = [name for name, weight in after.items() if (weight - before[name]).abs().max() > 1e-6]
    without_gradient = ("pooler", "key.bias")  # the mean is pooled; the softmax over keys is the same for any bias
    assert {name for name in after if not any(part in name for part in without_gradient)} <= set(moved)
    assert losses(trained)[-1] < losses(trained)[0]


WATCHED = [
    *("sft.cache_vision=false", "sft.thaw_vision=0.5", "sft.alignment=0", "sft.group_by_length=true"),
    *("sft.validation.steps=5", "sft.validation.reports=2", "sft.validation.publish=best", "sft.save_steps=1000"),
    "sft.check_steps=1",
]


@pytest.fixture(scope="module")
def validated(vision, shards, place):
    """SFT by Ray Train on a node that is to go, whose worker is then killed; vision thawed half-way, batches of alike
    lengths, validation beside it. The checkpoint and what was told of its progress."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    told, out = [], str(place / "validated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "loop", Preempted(place / "killed", after=3, saved=f"{out}.state/snapshot.json"))
        checkpoint = sft.run(shards, out, experiment(*WATCHED), vision.uri, told.append)
    return checkpoint, told


class Preempted(KilledOnce):
    """The SFT loop on a node that is to be taken away, which is known when it has made so many steps, and then is."""

    def __call__(self, job, resume):
        import ray.train

        calls = []
        ray.train.get_preemption_info = lambda: calls.append(1) or (object() if len(calls) >= self.after else None)
        super().__call__(job, resume)


def test_a_notice_of_preemption_saves_a_checkpoint_from_which_it_goes_on(validated, vision, shards, place):
    checkpoint, told = validated
    saved = [int(numbers["saved_step"]) for numbers in told if "saved_step" in numbers]
    assert saved[0] == 3  # neither a step to save nor one to validate
    assert (place / "killed").exists() and checkpoint.training.resumed_from_step == 3
    undisturbed = sft.run(shards, str(place / "not-preempted"), here(*WATCHED), vision.uri)
    assert checkpoint.training.steps == undisturbed.training.steps
    assert checkpoint.training.cases_seen == undisturbed.training.cases_seen
    assert losses(checkpoint) == pytest.approx(losses(undisturbed), abs=1e-5)


def test_checkpoints_are_validated_beside_the_training(validated):
    checkpoint, _ = validated
    steps = [entry["step"] for entry in checkpoint.training.validation]
    assert steps == list(range(5, checkpoint.training.steps + 1, 5))
    for entry in checkpoint.training.validation:
        assert entry["validation/loss"] > 0 and abs(entry["validation/grounding_gap"]) < 1
        assert 0 <= entry["validation/green"] <= 1 and 0 <= entry["validation/finding_f1"] <= 1
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


class Held(KilledOnce):
    """The SFT loop, which never gets over so many steps."""

    def __call__(self, job, resume):
        from mu2llm.stages.sft import loop
        from mu2llm.stages.worker import Batches

        given = Batches.__iter__

        def held(batches):
            for number, batch in enumerate(given(batches)):
                while number == self.after:
                    time.sleep(1)
                yield batch

        Batches.__iter__ = held
        loop(job, resume)


def command(arguments, address, loop, told):
    """`mu2llm …` on a cluster, with another loop than SFT's; what it prints goes to the file `told`."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    sft.loop = loop or sft.loop
    os.environ["RAY_ADDRESS"] = address
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), sys.stdout.fileno())
    sys.argv = ["mu2llm", *arguments]
    cli.main()


def test_a_killed_driver_goes_on_at_the_same_step(written, vision, shards, place):
    """`mu2llm train sft`, killed without a word when it has saved, and the same command again."""
    out, address = str(place / "driver"), ray.get_runtime_context().gcs_address
    arguments = ["train", "sft", "--preset", "tiny", "--data", shards, "--out", out, "--init", vision.uri, "--json"]
    told = place / "told.json"
    first, again = (
        gloo.SERVER.Process(target=command, args=(arguments, address, loop, told)) for loop in (Held("", after=5), None)
    )
    first.start()
    while not storage.exists(f"{out}.state/snapshot.json"):
        assert first.is_alive()
        time.sleep(0.05)
    first.kill()
    first.join()
    assert not storage.exists(f"{out}/{Checkpoint.FILE}")
    again.start()
    again.join()
    assert again.exitcode == 0
    told = json.loads(told.read_text())
    assert 0 < told["resumed_from_step"] < told["steps"]
    assert told["steps"] == written.training.steps
    assert told["cases_seen"] == written.training.cases_seen
    assert losses(open_checkpoint(out)) == pytest.approx(losses(written), abs=1e-4)


def test_pairs_are_kept_with_their_judge_and_made_once(pairs, written, shards):
    found = preferences.Preferences.open(pairs)
    assert found.judge.startswith("rules")
    assert 0 < found.pairs <= found.cases
    for pair in preferences.read_pairs(pairs):
        assert pair.chosen_score - pair.rejected_score >= experiment().preferences.margin
    again = preferences.prefer(written.uri, shards, pairs, experiment())
    assert again == found


def test_pairs_made_in_parts_are_those_made_at_once(pairs, written, shards, place, monkeypatch):
    out = place / "pairs-in-parts"
    shutil.copytree(Path(pairs) / preferences.SAMPLING, out / preferences.SAMPLING)
    sizes = []
    screened = preferences._screened
    monkeypatch.setattr(preferences, "_screened", lambda few, words: sizes.append(len(few)) or screened(few, words))
    monkeypatch.setattr(preferences, "AT_ONCE", 5 * experiment().preferences.candidates)
    found, whole = preferences.prefer(written.uri, shards, str(out), experiment()), preferences.Preferences.open(pairs)
    assert len(sizes) > 2
    assert found.model_dump(exclude={"green_best", "green_worst"}) == whole.model_dump(
        exclude={"green_best", "green_worst"}
    )
    assert found.green_best == pytest.approx(whole.green_best)
    for read in (preferences.read_pairs, preferences.read_judged):
        assert sorted(map(repr, read(str(out)))) == sorted(map(repr, read(pairs)))


def test_rounds_go_on_from_the_policy_that_the_last_one_made(written, shards, place, monkeypatch):
    monkeypatch.setattr(online, "drifted", lambda rounds: None)  # what stops them has a test of its own
    told, settings = [], here("dpo.epochs=1", "dpo.warmup=0")
    result = online.run(written.uri, shards, str(place / "online"), settings, 2, lambda *line: told.append(line[0]))
    assert [each.round for each in result.rounds] == [0, 1, 2] and result.stopped is None
    assert result.max_length_ratio == online.LENGTH_RATIO
    first, second = result.rounds[0], result.rounds[1]
    assert first.checkpoint == written.uri and first.pairs is None and second.pairs > 0
    for before, after in itertools.pairwise(result.rounds):
        assert open_checkpoint(after.checkpoint).lineage.parent == before.checkpoint
        made = preferences.Preferences.open(after.checkpoint.replace("checkpoint", "preferences"))
        assert made.inputs["preferences.max_length_ratio"] == online.LENGTH_RATIO
    assert {"round 1: candidates", "round 1: dpo", "round 1: held-out"} <= set(told)
    told.clear()
    again = online.run(written.uri, shards, str(place / "online"), settings, 2, lambda *line: told.append(line[0]))
    assert again == result and not told


def test_rounds_end_where_findings_get_worse_and_green_better():
    def scored(number, f1, green):
        estimates = {name: Estimate(value=v, low=v, high=v, n=9) for name, v in (("finding_f1", f1), ("green", green))}
        return online.Round(round=number, checkpoint=f"c{number}", words=70, **estimates)

    assert online.drifted([scored(0, 0.5, 0.5), scored(1, 0.5, 0.6)]) is None
    assert online.drifted([scored(0, 0.5, 0.5), scored(1, 0.4, 0.4)]) is None
    assert "round 1: held-out finding F1 fell from 0.500 to 0.400 while GREEN rose" in online.drifted(
        [scored(0, 0.5, 0.5), scored(1, 0.4, 0.6)]
    )


def test_dpo_prefers_what_was_chosen(pairs, place):
    trained = dpo.run(pairs, str(place / "dpo"), here("dpo.learning_rate=0.001", "dpo.epochs=6"))
    first, last = trained.training.history[0], trained.training.history[-1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-3)  # policy = reference
    assert last["rewards/margins"] > first["rewards/margins"]
    assert trained.lineage.judge == preferences.Preferences.open(pairs).judge
    assert first["kl"] == pytest.approx(0, abs=1e-3)
    assert abs(last["kl"]) > 1e-2
    processor = load_processor(trained.uri)
    for kind in ("chosen", "rejected"):
        tokens = [len(processor.token_ids(p.prompt, getattr(p, kind))[1]) for p in preferences.read_pairs(pairs)]
        seen = [entry[f"lengths/{kind}"] for entry in trained.training.history]
        assert min(tokens) <= min(seen) <= max(seen) <= max(tokens)
    assert last["rewards/accuracies"] > 0.5
    assert 5 < last["epoch"] <= 6


def test_two_workers_of_ray_train_prefer_what_one_does(pairs, place, caplog):
    one = dpo.run(pairs, str(place / "dpo-alone"), here())
    caplog.clear()
    two = dpo.run(pairs, str(place / "dpo-two"), experiment("dpo.workers=2"))
    assert "keeps nothing of its training scans" in caplog.text  # what a worker warns of, the driver says
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
    monkeypatch.setattr(policy.model, "encode_vision", lambda v, *more: encoded.append(len(v)) or original(v, *more))
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
            lambda place, shards: sft.run(shards, str(place / "x"), experiment("model.tokenizer.prior=3")),
            "takes its head from a contrastive checkpoint",
        ),
        (
            lambda place, shards: sft.run(
                shards, str(place / "x"), experiment("model.tokenizer.prior=99"), str(place / "contrastive")
            ),
            r"model.tokenizer.prior=99: the training reports have \d+ different findings; set \d+ or fewer",
        ),
        (
            lambda place, shards: sft.run(
                *(shards, str(place / "x"), experiment("model.tokenizer.prior=3", "sft.freeze_vision=false")),
                str(place / "contrastive"),
            ),
            "reads the vision that it was trained with: set freeze_vision=true",
        ),
        (
            lambda place, shards: online.run(
                *(str(place / "sft"), shards, str(place / "x"), experiment("preferences.max_cases=0"), 1, print)
            ),
            "samples nothing that could be judged",
        ),
        (
            lambda place, shards: online.run(str(place / "sft"), shards, str(place / "x"), experiment(), 0, print),
            "--rounds 0: give at least 1",
        ),
        (
            lambda place, shards: online.run(
                *(str(place / "sft"), shards, str(place / "x"), experiment("judge.name=nobody"), 1, print)
            ),
            "nobody",
        ),
        (
            lambda place, shards: sft.run(
                shards, str(place / "x"), experiment("model.max_text_tokens=60"), str(place / "contrastive")
            ),
            r"cases are longer than the 60 tokens .*set model.max_text_tokens=\d+, or sft.too_long=skip or truncate",
        ),
        (
            lambda place, shards: sft.run(
                shards, str(place / "x"), experiment("sft.max_steps=1"), str(place / "contrastive")
            ),
            "sft would learn nothing.*warm-up",
        ),
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


@pytest.mark.parametrize("setting", ["skip", "truncate"])
def test_texts_that_are_too_long_are_left_out_or_cut(setting, shards, vision, place):
    base, reports = experiment(), [case.report for case in Shards.open(shards).cases("train")]
    processor = build_processor(base.model, base.data.spec, sft.texts_of(base, reports))
    lengths = sorted(processor.text_tokens(base.evaluation.question, report) for report in reports)
    longest = lengths[len(lengths) * 3 // 4]
    settings = here(
        *(f"model.max_text_tokens={longest}", f"sft.too_long={setting}", "sft.report_share=1", "sft.max_steps=2")
    )
    job = new_job("sft", Shards.open(shards), str(place / setting), settings, parent=vision.uri)
    rows = sft.check_lengths(job, Shards.open(shards))
    assert (0 < rows < job.rows) if setting == "skip" else rows == job.rows
    assert sft.run(shards, str(place / setting), settings, vision.uri).training.steps == 2


def test_pairs_longer_than_the_model_takes_are_refused(pairs, written):
    made = preferences.read_pairs(pairs)
    long = made[0].model_copy(update={"chosen": "There is a cyst. " * 400})
    with pytest.raises(UserError, match=rf"pairs of 1 cases .*{long.case_id} \(\d+ tokens\)"):
        dpo.check_lengths([*made[1:], long], load_processor(written.uri))


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
    assert corrections.case_of_scan([same, other], opened, "train") == {"same": case.id}


def test_a_loss_that_is_not_finite_stops_and_names_the_cases(vision, shards, place):
    out = str(place / "nan")
    with pytest.raises(Failure, match="the loss is"):
        sft.run(shards, out, here("sft.learning_rate=1e30", "sft.max_grad_norm=1e30"), vision.uri)
    told = json.loads(storage.read_bytes(f"{out}.state/stopped.json"))
    assert told["case_ids"]
    assert Checkpoint.FILE not in [info.base_name for info in storage.list_files(out)]

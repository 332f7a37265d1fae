"""One axis over the stages: in fp32 and in bf16, from a checkpoint in fp32 and from one in bf16, without Ray."""

import datasets
import numpy as np
import pytest
import torch
from transformers import TrainingArguments
from trl import DPOConfig

from mu2llm import config, weights
from mu2llm.engine.decoder import ContinuousDecoder, Prompt, write
from mu2llm.engine.features import scan_features
from mu2llm.engine.loading import load
from mu2llm.engine.log_probabilities import sequence_logps
from mu2llm.engine.sampling import Decoding
from mu2llm.model import build, build_contrastive
from mu2llm.model import load as load_to_train
from mu2llm.records import Checkpoint, Lineage, PreferencePair
from mu2llm.stages import contrastive, dpo, sft
from mu2llm.stages.job import Job
from mu2llm.stages.steps import ContrastiveTrainer, SftTrainer
from mu2llm.stages.texts import TextBank

STEPS, CASES = 10, 4
REPORTS = [
    "There is a large left pleural effusion.",
    "There is a cyst in the right kidney.",
    "No finding.",
    "There is a nodule in the right lung. There is a large left pleural effusion.",
]
PLAIN = {
    **{"use_cpu": True, "report_to": [], "save_strategy": "no", "remove_unused_columns": False, "disable_tqdm": True},
    **{"learning_rate": 5e-4, "logging_steps": 1, "seed": 0},
}
SETTINGS = config.load("tiny", ["model.text_encoder=small", "sft.alignment=0", "sft.freeze_vision=false"])
QUESTION = SETTINGS.evaluation.question


def rows(seed=0):
    """As the stream gives them: a bright block in each scan, at a place of its own."""
    rng = np.random.default_rng(seed)
    voxels = rng.integers(0, 60, (CASES, *SETTINGS.data.spec.shape), dtype=np.uint8)
    for case in range(CASES):
        voxels[case, case % voxels.shape[1], :, 2:6, 8 * case : 8 * case + 16, 10:40] += 150
    mask = np.ones((CASES, SETTINGS.data.spec.chunks), bool)
    mask[2, -1] = False
    of_text = {"report": REPORTS, "questions": ["[]"] * CASES, "row": np.arange(CASES), "item": np.arange(CASES)}
    return {"id": [f"case {i}" for i in range(CASES)], "voxels": voxels, "chunk_mask": mask, **of_text}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["from fp32", "from bf16"])
def parent(request, tmp_path_factory):
    """URI of a checkpoint in that dtype, of one and the same bf16 values."""
    folder = tmp_path_factory.mktemp("parent")
    model, processor = build(SETTINGS.model, SETTINGS.data.spec, REPORTS, seed=0)
    model.bfloat16().to(request.param).save_pretrained(folder)
    processor.save_pretrained(folder)
    described(folder)
    return str(folder)


def described(folder):
    lineage = Lineage(stage="sft", spec_hash=SETTINGS.data.spec.hash)
    checkpoint = Checkpoint(uri=str(folder), lineage=lineage, experiment=SETTINGS.model_dump(mode="json"))
    (folder / Checkpoint.FILE).write_text(checkpoint.model_dump_json())


def contrast(parent, arguments):
    encoder = weights.text_encoder("small", REPORTS)
    texts = TextBank(encoder, "finding", REPORTS, 0)
    model = build_contrastive(SETTINGS.model, SETTINGS.data.spec, SETTINGS.contrastive, texts.width, parent)
    trainer = ContrastiveTrainer(model=model, args=TrainingArguments(**arguments))
    trainer.batches = [contrastive.collate(rows(), texts) for _ in range(STEPS)]
    return trainer


def supervise(parent, arguments):
    values = {"experiment": SETTINGS.model_dump(mode="json"), "spec_hash": SETTINGS.data.spec.hash}
    job = Job(stage="sft", data="", data_checksum="", out="", parent=parent, rows=1, **values)
    model, processor = sft.start(job, REPORTS)
    trainer = SftTrainer(model=model, args=TrainingArguments(**arguments))
    asking = sft.Instructions(QUESTION, 1, 0)
    trainer.batches = [sft.collate(rows(), "voxels", processor, None, asking) for _ in range(STEPS)]
    return trainer


def pairs():
    values = {"prompt": QUESTION, "chosen_score": 1.0, "rejected_score": 0.0, "judge": "rules"}
    return [
        PreferencePair(case_id=f"case {i}", chosen=REPORTS[i], rejected=REPORTS[i - 1], **values) for i in range(CASES)
    ]


def reference(parent, precision):
    """Log-probabilities (pairs, 2) as the reference's actors compute them."""
    model, processor = load(parent, precision)
    batch = dpo.Examples(pairs(), None, processor).collate(rows(), "voxels")
    batch.pop("case_ids")
    return torch.stack(sequence_logps(model, batch, None, precision).chunk(2), 1).numpy()


def prefer(parent, arguments):
    model, processor = load_to_train(parent, torch.float32)
    dpo.prepare(model, SETTINGS.dpo)
    precision = "bf16" if arguments["bf16"] else "fp32"
    examples = dpo.Examples(pairs(), reference(parent, precision), processor)
    trainer = dpo.Mu2DPOTrainer(
        model=model,
        args=DPOConfig(**{**arguments, "learning_rate": 1e-3}, **dpo.loss_arguments(SETTINGS.dpo)),
        train_dataset=datasets.Dataset.from_list([{"prompt": "", "chosen": "", "rejected": ""}]),
        data_collator=examples.collator,
        processing_class=processor.tokenizer,
    )
    trainer.batches = [examples.collate(rows(), "voxels") for _ in range(STEPS)]
    return trainer


def history(stage, parent, precision, folder):
    arguments = {"output_dir": str(folder), "max_steps": STEPS, "bf16": precision == "bf16", **PLAIN}
    trainer = stage(parent, arguments)
    assert all(each.dtype == torch.float32 for each in trainer.model.parameters())
    buffers = [each for each in trainer.model.buffers() if each.is_floating_point()]
    assert buffers and all(each.dtype == torch.float32 for each in buffers)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("stage", [contrast, supervise, prefer])
def test_a_stage_in_bf16_learns_what_it_does_in_fp32(stage, parent, tmp_path):
    """Contrast in bf16 trained with no positive pair, and DPO's rewards began at −0.17."""
    exact, rounded = (history(stage, parent, precision, tmp_path) for precision in ("fp32", "bf16"))
    ours, theirs = ([entry["loss"] for entry in each] for each in (rounded, exact))
    assert ours == pytest.approx(theirs, rel=0.03)
    assert ours != theirs and theirs[-1] < theirs[0]
    if stage is contrast:
        counted = sum(len(dict.fromkeys(trainable(report))) for report in REPORTS)
        assert {entry["positives"] for entry in rounded} == {entry["positives"] for entry in exact} == {counted}
    if stage is prefer:
        assert abs(rounded[0]["kl"]) < 1e-3 and abs(rounded[0]["rewards/margins"]) < 1e-3


def trainable(report):
    """The findings of a report, as contrast's positives."""
    return TextBank(weights.text_encoder("small", REPORTS), "finding", REPORTS, 0).split(report)


def test_log_probabilities_of_a_reference_are_near_those_of_fp32(parent):
    exact, rounded = reference(parent, "fp32"), reference(parent, "bf16")
    np.testing.assert_allclose(rounded, exact, rtol=0.005)
    assert not np.array_equal(rounded, exact)


@pytest.fixture(scope="module")
def fluent(tmp_path_factory):
    """URI of a checkpoint that knows the reports of its scans by heart."""
    folder = tmp_path_factory.mktemp("fluent")
    torch.manual_seed(0)
    model, processor = build(SETTINGS.model, SETTINGS.data.spec, REPORTS, seed=0)
    arguments = {"output_dir": str(folder / "trainer"), "max_steps": 150, **PLAIN, "learning_rate": 1e-2}
    trainer = SftTrainer(model=model, args=TrainingArguments(**{**arguments, "logging_steps": 150}))
    asking = sft.Instructions(QUESTION, 1, 0)
    trainer.batches = [sft.collate(rows(), "voxels", processor, None, asking) for _ in range(150)]
    trainer.train()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    described(folder)
    return str(folder)


@pytest.mark.parametrize("decoding", [Decoding(60), Decoding(60, samples=2, temperature=0.5, seed=3)])
def test_reports_and_candidates_in_bf16_are_those_of_fp32(fluent, decoding):
    """Of what evaluate, generate and prefer write: on scans it knows, a model writes the same in both."""
    written = {}
    for precision in ("fp32", "bf16"):
        model, processor = load(fluent, precision)
        features, mask = scan_features(model, rows(), precision)
        decoder = ContinuousDecoder(model, processor, precision)
        prompts = [Prompt(QUESTION, f"case {i}", decoding) for i in range(CASES)]
        written[precision] = [[text.text for text in each] for each in write(decoder, features, mask, prompts)]
    assert written["bf16"] == written["fp32"]
    if not decoding.temperature:
        assert [text for (text,) in written["bf16"]] == REPORTS

"""Shards and checkpoints of the least size: random voxels, models that know nothing."""

import tempfile

import numpy as np
import pytest

from mu2llm import config, storage
from mu2llm.artefacts import publish
from mu2llm.cases.ingest import schema
from mu2llm.cases.shards import Index, ShardWriter, shard_file, write_index
from mu2llm.model import build
from mu2llm.records import Case, Checkpoint, Finding, Lineage, Question, Training

SIDES = ("left", "right")


def least():
    spec = {"name": "least", "windows": [[-1000, 400]], "grid": [8, 16, 16], "chunks": 2, "fit": "stretch"}
    return config.validate(
        {
            "data": {"spec": spec},
            "model": {
                "small": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "vocabulary": 300},
                "vision": {
                    **{"hidden_size": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 32},
                    **{"patch_size": [2, 4, 4], "class_token": False},
                },
                "tokenizer": {"num_layers": 1, "num_heads": 2, "queries": 4, "top_k": 4, "scales": [1, 2]},
                "max_text_tokens": 128,
            },
            "evaluation": {"max_new_tokens": 12, "batch_size": 4, "bootstrap": 100},
        }
    )


def case(i: int) -> Case:
    """Every third without a finding; two scans of each patient."""
    side = SIDES[i % 2]
    present = i % 3 != 0
    text = f"There is a large {side} pleural effusion." if present else "No pleural effusion."
    return Case(
        id=f"case-{i:02d}",
        patient=f"patient-{i // 2}",
        volume=f"volumes/{i}.nii.gz",
        report=f"Findings: {text} The liver is normal.",
        questions=(Question(question="What does the scan show in the chest?", answer=text, region="chest"),),
        findings=(Finding(name="pleural effusion", side=side),) if present else (),
    )


def write_shards(uri: str, cases: list[Case], split: str = "test", experiment=None):
    """Finished shards with random voxels; the last chunk of every fourth case is padding."""
    spec, rng = (experiment or least()).data.spec, np.random.default_rng(0)
    path = f"{split}/00000.parquet"
    with storage.staged(storage.join(uri, path)) as local, ShardWriter(local, schema(spec)) as writer:
        for i, each in enumerate(cases):
            row = {
                **each.row(),
                "split": split,
                "voxels": rng.integers(0, 256, spec.shape, dtype=np.uint8),
                "chunk_mask": np.arange(spec.chunks) < spec.chunks - (i % 4 == 3),
                "affine": np.eye(4),
                "spacing_mm": np.ones(3),
                "warnings": "[]",
            }
            writer.write({name: [value] for name, value in row.items()})
        writer.summarise(ids=[each.id for each in cases], rejected=[])
    index = Index.of(spec, {split: [shard_file(uri, path)]})
    return write_index(uri, index, [each.model_copy(update={"split": split}) for each in cases])


def write_checkpoint(uri: str, seed: int, stage: str = "sft", experiment=None):
    """An untrained model as a finished checkpoint."""
    settings = experiment or least()
    texts = [case(i).report for i in range(6)]
    model, processor = build(settings.model, settings.data.spec, texts, seed)
    checkpoint = Checkpoint(
        uri=uri,
        experiment=settings.model_dump(mode="json"),
        lineage=Lineage(stage=stage, spec_hash=settings.data.spec.hash, seed=seed, identity=f"{stage}-{seed}"),
        training=Training(steps=3, history=[{"step": s, "loss": 3.0 - s} for s in range(3)]),
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        publish(checkpoint, folder)
    return uri


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(str(tmp_path_factory.mktemp("shards")), [case(i) for i in range(10)])


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {stage: write_checkpoint(str(folder / stage), seed, stage) for seed, stage in enumerate(("sft", "dpo"))}

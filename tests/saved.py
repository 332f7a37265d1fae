"""Checkpoints and shards of a few bytes, for tests that read neither weights nor voxels; models that nobody trained."""

import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mu2llm.artefacts import publish
from mu2llm.cases.shards import Index, ShardFile, write_index
from mu2llm.records import Case, Checkpoint, Lineage


def weights(folder, value=0.0, vision=0.0, name="model.safetensors", config="{}"):
    """A `save_pretrained` folder of a vision tower and a head of one number each."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {"model.vision.patch": np.full(2, vision, np.float32), "lm_head": np.full(3, value, np.float32)}
    save_file(tensors, Path(folder) / name)
    (Path(folder) / "config.json").write_text(config)


def checkpoint(uri, experiment=None, value=0.0, vision=0.0, **lineage):
    """A published checkpoint of such weights."""
    values = experiment.model_dump(mode="json") if experiment else {}
    described = {"stage": "sft", "spec_hash": experiment.data.spec.hash if experiment else "s", **lineage}
    with tempfile.TemporaryDirectory() as folder:
        weights(folder, value, vision)
        return publish(Checkpoint(uri=str(uri), experiment=values, lineage=Lineage(**described)), folder)


def untrained(uri, experiment, stage, *parts):
    """A model, and its processor if it has one, as a stage's finished checkpoint; its URI."""
    lineage = Lineage(stage=stage, spec_hash=experiment.data.spec.hash, identity=f"{stage}-0")
    checkpoint = Checkpoint(uri=uri, experiment=experiment.model_dump(mode="json"), lineage=lineage)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            part.save_pretrained(folder)
        publish(checkpoint, folder)
    return uri


def shards(uri, experiment, cases=8, scans="a"):
    """The index and the cases of shards whose rows nobody reads: half of them to train, half to test."""
    half = cases // 2
    splits = ("train", "test")
    rows = [
        Case(id=f"{split}{i}", patient=f"{split}{i}", volume="", report="Normal.", split=split)
        for split in splits
        for i in range(half)
    ]
    files = {split: [ShardFile(path=f"{split}/0.parquet", rows=half, bytes=1, sha256=scans)] for split in splits}
    return write_index(str(uri), Index.of(experiment.data.spec, files), rows)

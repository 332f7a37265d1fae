"""Shards, a contrastive and an SFT checkpoint, and judged pairs of the least size: nothing here was trained."""

import numpy as np
import pytest
import saved
import yaml

from mu2llm import config, storage
from mu2llm.cases.ingest import schema
from mu2llm.cases.shards import Index, ShardWriter, shard_file, write_index
from mu2llm.green import load_judge
from mu2llm.model import build, build_contrastive
from mu2llm.records import Candidate, Case, Finding
from mu2llm.stages import preferences
from mu2llm.stages.pairs import make_pairs
from mu2llm.stages.rewards import rewarded

COUNTS = {"train": 12, "validation": 4, "test": 4}
PRESET = {
    "data": {"spec": {"name": "least", "windows": [[-1000, 400]], "grid": [8, 16, 16], "chunks": 2, "fit": "stretch"}},
    "model": {
        "small": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "vocabulary": 300},
        "vision": {
            **{"hidden_size": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 32},
            **{"patch_size": [2, 4, 4], "class_token": False},
        },
        "tokenizer": {"num_layers": 1, "num_heads": 2, "queries": 4, "top_k": 4, "scales": [1, 2]},
        "max_text_tokens": 128,
    },
    "sft": {"freeze_vision": True, "epochs": 2, "batch_size": 4, "log_steps": 1},
    "dpo": {"freeze_vision": True, "epochs": 2, "batch_size": 4, "log_steps": 1},
    "preferences": {"candidates": 2, "max_new_tokens": 8, "negatives": "corrupted", "min_words": 1},
    "evaluation": {"max_new_tokens": 8, "batch_size": 4, "bootstrap": 100, "regions": False},
    "sweep": {"reports": 2, "workers_per_trial": 0, "final_seeds": 0, "max_concurrent": 1},
}


@pytest.fixture(scope="session")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "least.yaml"
    path.write_text(yaml.safe_dump(PRESET))
    return str(path)


@pytest.fixture(scope="session")
def least(preset):
    return lambda *overrides: config.load(preset, list(overrides))


@pytest.fixture(autouse=True)
def tracking_store(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mu2llm.db")


@pytest.fixture(scope="session")
def shards(tmp_path_factory, least):
    uri, spec = str(tmp_path_factory.mktemp("sweep-shards")), least().data.spec
    rng = np.random.default_rng(0)
    splits, cases = {}, []
    for split, count in COUNTS.items():
        own = [case(i, split) for i in range(count)]
        path = f"{split}/00000.parquet"
        with storage.staged(storage.join(uri, path)) as local, ShardWriter(local, schema(spec)) as writer:
            for each in own:
                row = {
                    **each.row(),
                    **{"voxels": rng.integers(0, 256, spec.shape, dtype=np.uint8), "warnings": "[]"},
                    **{"chunk_mask": np.ones(spec.chunks, bool), "affine": np.eye(4), "spacing_mm": np.ones(3)},
                }
                writer.write({name: [value] for name, value in row.items()})
            writer.summarise(ids=[each.id for each in own], rejected=[])
        splits[split] = [shard_file(uri, path)]
        cases += own
    return write_index(uri, Index.of(spec, splits), cases)


def case(i: int, split: str) -> Case:
    side, present = ("left", "right")[i % 2], i % 3 != 0
    text = f"There is a large {side} pleural effusion." if present else "No pleural effusion."
    return Case(
        id=f"{split}-{i:02d}",
        patient=f"{split}-{i // 2}",
        volume=f"volumes/{split}-{i}.nii.gz",
        report=f"Findings: {text} The liver is normal.",
        split=split,
        findings=(Finding(name="pleural effusion", side=side),) if present else (),
    )


@pytest.fixture(scope="session")
def vision(tmp_path_factory, least):
    given = least()
    model = build_contrastive(given.model, given.data.spec, given.contrastive, 32, seed=0)
    return saved.untrained(str(tmp_path_factory.mktemp("vision")), given, "contrastive", model)


@pytest.fixture(scope="session")
def written(tmp_path_factory, least):
    given = least()
    model, processor = build(given.model, given.data.spec, [case(i, "train").report for i in range(6)], 0)
    return saved.untrained(str(tmp_path_factory.mktemp("sft")), given, "sft", model, processor)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, least, shards, written):
    """What `prefer` would have written: four candidates a case, from right to wrong."""
    uri, judge, settings = str(tmp_path_factory.mktemp("pairs")), load_judge(least().judge), least().preferences
    every, made = [], []
    for each in shards.cases("train"):
        wrong = "There is a large liver mass."
        texts = [each.report, f"{each.report} {wrong}", "Findings: No pleural effusion.", f"Findings: {wrong}"]
        own = [Candidate(case_id=each.id, index=i, text=t, origin="sampled", seed=0) for i, t in enumerate(texts)]
        judgements = judge.judge([(each.report, candidate.text) for candidate in own])
        judged = rewarded({"green": 1.0}, each.report, list(zip(own, judgements, strict=True)))
        every += judged
        made += make_pairs(least().evaluation.question, judged, settings)[0]
    with preferences.tables(uri) as write:
        write(every, made)
    about = preferences.Preferences(
        **{"shards": shards.uri, "data_checksum": shards.checksum, "spec_hash": shards.spec.hash, "split": "train"},
        **{"checkpoint": written, "judge": judge.identity, "identity": "pairs-0", "cases": 12, "pairs": len(made)},
        **{"candidates": len(every), "cases_with_pairs": len(made), "dropped": {}},
        **{"green_best": 1.0, "green_worst": 0.0},
    )
    storage.write_json(storage.join(uri, preferences.Preferences.FILE), about.model_dump(mode="json"))
    return uri

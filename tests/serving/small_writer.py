"""Checkpoints of the least size that have learnt one report by heart, so that what they write can be known."""

import tempfile

import torch

from mu2llm import config
from mu2llm.artefacts import publish
from mu2llm.model import build
from mu2llm.records import Checkpoint, Lineage

FIRST = (
    "Findings: There is a large left pleural effusion. The liver is normal. No lung nodule. "
    "Impression: Left pleural effusion."
)
SECOND = "Findings: There is a right lung nodule of 12 mm. The heart is not enlarged. Impression: Right lung nodule."
QUESTION = "Write the radiology report of this CT scan."
STEPS = 120


def experiment(**spec):
    small = {"hidden_size": 48, "num_layers": 1, "num_heads": 2, "mlp_dim": 64, "vocabulary": 320}
    vision = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    return config.validate(
        {
            "data": {
                "spec": {"name": "least", "windows": [[-1000, 400]], "grid": [8, 16, 16], "chunks": 2, "fit": "stretch"}
                | spec
            },
            "model": {
                "small": small,
                "vision": {**vision, "patch_size": [2, 4, 4], "class_token": False},
                "tokenizer": {"num_layers": 1, "num_heads": 2, "queries": 4, "top_k": 4, "scales": [1, 2]},
                "max_text_tokens": 192,
            },
            "evaluation": {"max_new_tokens": 96, "question": QUESTION},
        }
    )


def write_checkpoint(uri: str, report: str, **spec) -> str:
    """A finished checkpoint at `uri` that writes `report` of any scan."""
    settings = experiment(**spec)
    model, processor = build(settings.model, settings.data.spec, [FIRST, SECOND] * 4, seed=0)
    shape = settings.data.spec.shape
    generator = torch.Generator().manual_seed(0)
    voxels = torch.randint(0, 256, (4, *shape), dtype=torch.uint8, generator=generator)
    batch = processor.encode([QUESTION] * 4, [report] * 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch, volumes=voxels).loss
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.2, f"it did not learn its report: loss {float(loss):.2f}"
    lineage = Lineage(stage="sft", spec_hash=settings.data.spec.hash, identity=uri.rsplit("/", 1)[-1])
    checkpoint = Checkpoint(uri=uri, experiment=settings.model_dump(mode="json"), lineage=lineage)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        publish(checkpoint, folder)
    return uri

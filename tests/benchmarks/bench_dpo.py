"""A DPO step, measured: `python tests/benchmarks/bench_dpo.py [--pairs 8] [--steps 5]` prints the table.

Stock trl against ours with the same model, pairs, loss and optimiser, each in a process of its own, in one run. Stock
trl encodes a pair's scan for chosen and for rejected, by the policy and by the reference: four times; ours once, with
the reference's log-probabilities made before; and not at all where vision is frozen and its features are cached.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import datasets
import torch
from trl import DPOConfig, DPOTrainer

from mu2llm import config
from mu2llm.ct import phantom
from mu2llm.engine.log_probabilities import sequence_logps
from mu2llm.memory import PeakMemory
from mu2llm.model import build
from mu2llm.records import PreferencePair
from mu2llm.stages import dpo

SIZES = {
    "demo's vision": [],
    "vision dominates": [
        *("model.vision.stem=linear", "model.vision.num_layers=6", "model.vision.hidden_size=256"),
        "model.vision.mlp_dim=1024",
    ],
}
WAYS = {
    "stock": "stock trl: reference in the loop",
    "ours": "ours: reference made once before",
    "cached": "ours, vision frozen: features cached",
}


def make(way: str, size: str, pairs: int) -> tuple[Any, dict[str, Any], list[int]]:
    """Trainer, batch, and a list to which each call of the vision encoder adds its number of scans."""
    experiment = config.load("demo", SIZES[size])
    spec, question = experiment.data.spec, experiment.evaluation.question
    reports = phantom_reports(2 * pairs)
    model, processor = build(experiment.model, spec, reports)
    reference, _ = build(experiment.model, spec, reports)
    texts = zip(reports[:pairs], reports[pairs:], strict=True)
    made = [
        PreferencePair(
            case_id=str(i), prompt=question, chosen=a, rejected=b, chosen_score=1, rejected_score=0, judge=""
        )
        for i, (a, b) in enumerate(texts)
    ]
    examples = dpo.Examples(made, None, processor)
    voxels = torch.randint(0, 256, (pairs, *spec.shape), dtype=torch.uint8, generator=torch.manual_seed(0))
    mask = torch.ones(pairs, spec.chunks, dtype=torch.bool)
    scan, given = "voxels", voxels
    if way == "cached":
        model.freeze_vision()
        scan, given = "features", model.eval().encode_vision(voxels, mask)
    rows = {"id": [pair.case_id for pair in made], "item": range(pairs), scan: given, "chunk_mask": mask}
    batch = examples.collate(rows, scan)
    batch.pop("case_ids")
    arguments = dpo.loss_arguments(experiment.dpo) | {"output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False}
    common = {
        "train_dataset": datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        "data_collator": examples.collator,
        "processing_class": processor.tokenizer,
    }
    if way == "stock":
        batch |= {name: torch.cat([batch[name]] * 2) for name in ("volumes", "chunk_mask")}
        batch |= {name: torch.cat([batch[name]] * 2) for name in ("question_ids", "question_mask")}
        arguments |= {"precompute_ref_log_probs": False, "report_to": []}
        trainer: Any = DPOTrainer(model=model, ref_model=reference, args=DPOConfig(**arguments), **common)
    else:
        chosen, rejected = sequence_logps(reference, batch).chunk(2)
        batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        del reference
        trainer = dpo.Mu2DPOTrainer(model=model, args=DPOConfig(**arguments, report_to=[]), **common)
    encoded: list[int] = []
    for each in (model, getattr(trainer, "ref_model", None)):
        if each is not None:
            each.model.vision.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    return trainer, batch, encoded


def phantom_reports(count: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, open(phantom.write(folder, count, seed=0)) as manifest:
        return [json.loads(line)["report"] for line in manifest]


def measure(way: str, size: str, pairs: int, steps: int) -> dict[str, float]:
    """The best step's seconds, scans encoded a pair, and the process's highest memory during the steps."""
    trainer, batch, encoded = make(way, size, pairs)
    model = trainer.model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    seconds = []
    with PeakMemory(0.05) as memory:
        for _ in range(steps + 1):
            encoded.clear()
            started = time.perf_counter()
            loss = trainer.compute_loss(model, dict(batch))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds[1:]), "encodings": sum(encoded) / pairs, "gib": memory.gib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SIZE"), help="measure one row and print it as JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one, given.pairs, given.steps)))
        return
    print(f"{given.pairs} pairs a step, {torch.get_num_threads()} threads, the best of {given.steps} steps")
    for size in SIZES:
        print(f"{size:40s} {'encodings a pair':>16s} {'s a step':>9s} {'peak GiB':>9s} {'faster':>7s}")
        first = 0.0
        for way, title in WAYS.items():
            command = [sys.executable, __file__, "--one", way, size, "--pairs", str(given.pairs)]
            done = subprocess.run([*command, "--steps", str(given.steps)], capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            first = first or row["seconds"]
            numbers = f"{row['encodings']:16.1f} {row['seconds']:9.2f} {row['gib']:9.2f} {first / row['seconds']:6.1f}×"
            print(f"{title:40s} {numbers}", flush=True)


if __name__ == "__main__":
    main()

"""The same numbers on the CPU in fp32, and on the device in fp32, TF32 and bf16."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import Machine, matmul_precision
from rows import Row, at_least, told, within
from torch import Tensor

from mu2llm import config
from mu2llm.engine.decoder import ContinuousDecoder, Prompt
from mu2llm.engine.loading import place
from mu2llm.engine.log_probabilities import sequence_logps
from mu2llm.engine.sampling import Decoding
from mu2llm.model import build, build_contrastive
from mu2llm.model.convert import load_reference_tokenizer, load_reference_vision

MODES = {"fp32": ("highest", "fp32", 1e-4), "TF32": ("high", "fp32", 5e-3), "bf16": ("high", "bf16", 5e-2)}
"""Each way to compute: torch's matmul precision, our precision, the relative error (of norms) that is its own."""
GRADIENTS = 4  # times as much error in a gradient, which went through everything twice
GREEDY = 32
QUESTION = "Write the radiology report of this CT scan."
REPORTS = ["There is a large left pleural effusion. The liver is normal.", "There is a nodule in the right lung."]
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


def experiment(small: bool) -> config.Experiment:
    """Blocks of all kinds, a few of each."""
    width, layers = (32, 1) if small else (256, 4)
    spec = {"name": "parity", "windows": [[-1000, 400]], "grid": [16, 32, 32], "chunks": 4, "fit": "stretch"}
    small_model = {"hidden_size": width, "num_layers": layers, "num_heads": 2, "mlp_dim": 2 * width, "vocabulary": 320}
    vision = {"hidden_size": width, "num_layers": layers, "num_heads": 2, "mlp_dim": 2 * width}
    tokenizer = {"num_layers": 1 if small else 2, "num_heads": 2, "queries": 8, "top_k": 16}
    model = {"small": small_model, "vision": vision | {"patch_size": [2, 4, 4]}, "tokenizer": tokenizer}
    return config.validate({"data": {"spec": spec}, "model": model | {"max_text_tokens": 256}})


def check(machine: Machine) -> Iterator[Row]:
    settings = experiment(machine.small)
    model, processor = build(settings.model, settings.data.spec, REPORTS * 4, seed=0)
    contrast = build_contrastive(settings.model, settings.data.spec, settings.contrastive, 24, seed=0)
    generator = torch.Generator().manual_seed(0)
    volumes = torch.randint(0, 256, (2, *settings.data.spec.shape), dtype=torch.uint8, generator=generator)
    mask = torch.ones(volumes.shape[:2], dtype=torch.bool)
    mask[1, -1] = False
    scans = {"volumes": volumes, "chunk_mask": mask}
    texts = {"text_embeddings": torch.randn(6, 24, generator=generator), "owner": torch.arange(6) // 3}
    given = {"scans": scans, "texts": texts, "sft": {**scans, **processor.encode([QUESTION] * 2, REPORTS)}}
    given["dpo"] = _pairs(processor, scans)
    exact = _numbers(model, contrast, given, "cpu", "fp32")
    written = _greedy(model, processor, scans, "cpu", "fp32")
    for mode, (matmul, precision, most) in MODES.items():
        if mode == "TF32" and not machine.cuda:
            continue  # a CPU has none
        with matmul_precision(matmul):
            found = _numbers(model, contrast, given, machine.device, precision)
            same = _agreed(_greedy(model, processor, scans, machine.device, precision), written)
        for name, value in found.items():
            limit, off = most * (GRADIENTS if "gradient" in name else 1), relative(value, exact[name])
            yield within("parity", f"{name}, {mode} against the CPU's fp32: relative error", off, limit)
        what = f"first tokens of {GREEDY} that are the same, written greedily in {mode}"
        if mode == "fp32":
            yield at_least("parity", what, same, GREEDY)
        else:  # of a model that has learned nothing, where tokens are nearly as probable as each other
            yield told("parity", what, f"{same} of {GREEDY}", same)
    yield from _golden(machine)


def _pairs(processor: Any, scans: dict[str, Tensor]) -> dict[str, Any]:
    """trl's batch of two pairs: all chosen before all rejected."""
    whole = processor.encode([QUESTION] * 4, [*REPORTS, *reversed(REPORTS)])
    answers = (whole["labels"] != -100).long()
    ids = {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"], "completion_mask": answers}
    questions = {name: whole[name][:2] for name in ("question_ids", "question_mask")}
    return {**scans, **ids, **questions, "tile_scans": True}


def _numbers(model: Any, contrast: Any, given: dict[str, Any], device: str, precision: str) -> dict[str, Tensor]:
    """All that is compared, on the CPU in fp64."""
    model, contrast = (copy.deepcopy(each).to(device).train() for each in (model, contrast))
    on = {name: _moved(batch, device) for name, batch in given.items()}
    found: dict[str, Tensor] = {}
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        found["vision features"] = model.encode_vision(**on["scans"])
        questions = {name: on["sft"][name] for name in ("question_ids", "question_mask")}
        found["visual tokens"] = model.encode_volumes(**on["scans"], **questions).tokens
        found["SFT loss"] = model(**on["sft"]).loss
        found["contrastive loss"] = contrast(**on["scans"], **on["texts"]).loss
        batch = dict(on["dpo"])
        answers = batch.pop("completion_mask")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        each = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        chosen, rejected = (each * answers).sum(1).chunk(2)
        # against a reference that is as sure of both
        found["DPO loss"] = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    for name, of in (("SFT", model), ("contrastive", contrast), ("DPO", model)):
        of.zero_grad()
        found[f"{name} loss"].backward(retain_graph=True)
        gradients = [p.grad.flatten() for p in of.parameters() if p.grad is not None]
        found[f"{name} gradient"] = torch.cat(gradients)
    frozen = place(copy.deepcopy(model).eval(), precision, device)  # type: ignore[arg-type]
    found["log-probabilities"] = sequence_logps(frozen, on["dpo"], None, precision)  # type: ignore[arg-type]
    return {name: value.detach().double().cpu() for name, value in found.items()}


def _greedy(model: Any, processor: Any, scans: dict[str, Tensor], device: str, precision: str) -> list[list[int]]:
    frozen = place(copy.deepcopy(model), precision, device)  # type: ignore[arg-type]
    decoder = ContinuousDecoder(frozen, processor, precision)  # type: ignore[arg-type]
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        features = frozen.encode_vision(**_moved(scans, device))
    prompts = [Prompt(QUESTION, str(i), Decoding(GREEDY)) for i in range(len(features))]
    sequences = decoder.join(features, scans["chunk_mask"].to(device), prompts)
    for _ in range(GREEDY - 1):  # also behind an end: what is compared is the decoding
        decoder.step()
    return [sequence.ids for sequence in sequences]


def _agreed(ours: list[list[int]], theirs: list[list[int]]) -> int:
    """Tokens up to the first that differs, of the text where that is first."""
    each = zip(ours, theirs, strict=True)
    return min(next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), GREEDY) for pair in each)


def _golden(machine: Machine) -> Iterator[Row]:
    """The published implementation's numbers, on the device."""
    if not GOLDEN.is_dir():
        yield Row("parity", "golden files", "≤ 1e-05", f"no folder {GOLDEN}", "skipped")
        return
    from safetensors.torch import load_file

    known_arguments = json.loads((GOLDEN / "configs.json").read_text())
    for name, arguments in known_arguments.items():
        arguments.pop("seed")
        known = load_file(GOLDEN / f"{name}.safetensors", device=machine.device)
        weights = {key.removeprefix("weights."): t for key, t in known.items() if key.startswith("weights.")}
        with torch.no_grad(), matmul_precision("highest"):
            if name == "vision_projector":
                module = load_reference_vision(weights, **arguments).to(machine.device)
                outputs = dict(zip(("vision", "projected"), module(known["input.volume"]), strict=True))
            else:
                module = load_reference_tokenizer(weights, **arguments).to(machine.device)
                outputs = {"tokens": module(known["input.visual"], known["input.text"])}
        off = max(float((value - known[f"output.{key}"]).abs().max()) for key, value in outputs.items())
        yield within("parity", f"golden {name}: largest difference", off, 1e-5)


def _moved(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def relative(given: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((given - expected).norm() / expected.norm().clamp(min=1e-12))

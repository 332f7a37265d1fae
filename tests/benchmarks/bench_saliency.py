"""Which way of telling what a sentence depended on in a scan passes a deletion test, and points at the lesion.

    python tests/benchmarks/bench_saliency.py --checkpoint CHECKPOINT [--phantoms N] [--seed N]

The model writes the reports of phantoms that it has not seen. For each sentence that names a finding which is there,
each way shows the 5 % of the body's cells that weigh most. Then these are taken away (filled by the blurred scan, the
mean of the training scans, or another patient's scan), and random regions of the body of the same size in one piece:
by how much more does the sentence's log-probability fall? And does the cell that weighs most hold any of the lesion?
Lesions are known: a phantom is drawn again without the finding. Intervals are bootstrapped over patients.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mu2llm.artefacts import open_checkpoint
from mu2llm.ct import CTVolume, ModelInput, phantom, prepare, whole
from mu2llm.ct.phantom.anatomy import Anatomy
from mu2llm.ct.phantom.making import draw
from mu2llm.ct.phantom.plan import BLOCK, Plan, draw_plan
from mu2llm.engine.decoder import ContinuousDecoder, Prompt, write
from mu2llm.engine.loading import load
from mu2llm.engine.occlusion import Answer, Occlusion, Reader, blurred, region, top
from mu2llm.engine.sampling import Decoding
from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.green import findings
from mu2llm.model.prior import DiagnosticPrior
from mu2llm.records import Estimate, PreprocessSpec
from mu2llm.serving.influence import spans

PREVALENCE = 0.2
CHANGED = 25  # of 255: a voxel that belongs to a lesion
HELD = 0.05  # of a cell: it holds some of the lesion
CONTROLS = 8
STEPS = 16  # of integrated gradients
Maps = np.ndarray  # (sentences, z, y, x)
FILLS = ("blurred", "mean of training", "another patient's")


@dataclass(frozen=True)
class Case:
    """A phantom as the model takes it, and each finding's lesion: which of the cells (z, y, x) hold any of it."""

    patient: str
    scan: ModelInput
    lesions: dict[tuple[str, str | None], np.ndarray]


def case_of(seed: int, index: int, spec: PreprocessSpec) -> Case:
    """Phantom `index` of a seed."""
    made = phantom.make(seed, index, PREVALENCE)
    first = index - 1 if index % BLOCK == BLOCK - 1 else index
    anatomy, plan = Anatomy.draw(np.random.default_rng([seed, first, 0])), draw_plan(seed, index, PREVALENCE)
    scan = prepare(CTVolume(made.hu, made.affine), spec)
    lesions = {}
    for name, item in plan.items():
        other = without(anatomy, plan, name, np.random.default_rng([seed, index, 1]), spec)
        changed = (np.abs(other.voxels.astype(int) - scan.voxels.astype(int)) > CHANGED).any(1, keepdims=True)
        share = cells_of(whole(changed, spec)[0])
        lesions[name, item.finding.side] = share >= HELD
    return Case(made.patient, scan, lesions)


def without(anatomy: Anatomy, plan: Plan, name: str, rng: np.random.Generator, spec: PreprocessSpec) -> ModelInput:
    """The same patient without one finding."""
    hu, affine = draw(anatomy, {other: item for other, item in plan.items() if other != name}, rng)
    return prepare(CTVolume(hu, affine), spec)


def cells_of(grid: np.ndarray) -> np.ndarray:
    """(Z, Y, X) → the mean of each of 8 × 8 × 8 cells."""
    z, y, x = (size // 8 for size in grid.shape)
    return grid.reshape(8, z, 8, y, 8, x).mean((1, 3, 5))


# ---- the ways


@dataclass(frozen=True)
class Baseline:
    """What features are when nothing is seen: those of the mean of the training scans (C, Z, Y, X)."""

    grid: Tensor
    features: Tensor


def occlusion(seen: Occlusion, fill: Tensor) -> Maps:
    return seen.weights(fill)


def single_cells(seen: Occlusion, fill: Tensor) -> Maps:
    places = np.argwhere(seen.body)
    alone = np.zeros((len(places), *seen.body.shape), bool)
    alone[np.arange(len(places)), *places.T] = True
    maps = np.zeros((len(seen.parts), *seen.body.shape))
    maps[:, *places.T] = seen.drops(list(alone), fill).T
    return maps


def gradients(seen: Occlusion, base: Baseline, steps: int) -> Maps:
    """Integrated gradients of each log-probability along the way from the baseline's features to the scan's, times how
    far they are apart; with one step, gradient × input at the scan itself."""
    way = torch.ones(1) if steps == 1 else (torch.arange(steps) + 0.5) / steps
    points = base.features + way[:, None, None, None] * (seen.features - base.features)
    maps = []
    for i in range(len(seen.parts)):
        points = points.detach().clone().requires_grad_(True)
        gradient = torch.autograd.grad(differentiable(seen, points)[:, i].sum(), points)[0].mean(0)
        maps.append(((seen.features - base.features)[0] * gradient).sum(-1))
    return torch.stack(maps).detach().numpy().reshape(len(maps), *seen.body.shape)


def differentiable(seen: Occlusion, features: Tensor) -> Tensor:
    """The log-probabilities, with gradients also through what the diagnostic prior tells."""
    model, rows = seen.reader.model, len(features)
    text = torch.cat([seen.prompt["input_ids"], seen.ids[None]], dim=1).expand(rows, -1)
    question = {name: seen.prompt[name].expand(rows, -1) for name in ("question_ids", "question_mask")}
    mask = seen.mask.expand(rows, -1)
    with torch.enable_grad():
        logits = model(input_ids=text, vision_features=features, chunk_mask=mask, **question).logits
        each = logits[:, -len(seen.ids) - 1 : -1].log_softmax(-1).gather(-1, seen.ids.expand(rows, -1)[..., None])
        return torch.stack([each[:, part, 0].sum(1) for part in seen.parts], dim=1)


def selections(seen: Occlusion, weighed: bool) -> Maps:
    """What the visual tokens took from where: all alike, or each weighed by ‖gradient‖·‖token‖ (of those of a
    diagnostic prior nothing is known)."""
    model, question = seen.reader.model, {n: seen.prompt[n] for n in ("question_ids", "question_mask")}
    with torch.no_grad():
        visual = model.encode_volumes(
            vision_features=seen.features, chunk_mask=seen.mask[None], return_selection=True, **question
        )
    selected = visual.selection[0]
    shares = torch.ones(len(seen.parts), len(selected))
    if weighed:
        tokens = visual.tokens.clone().requires_grad_(True)
        text = torch.cat([seen.prompt["input_ids"], seen.ids[None]], dim=1)
        with torch.enable_grad():
            logits = model(input_ids=text, visual_tokens=tokens).logits[0, -len(seen.ids) - 1 : -1]
            each = logits.log_softmax(-1).gather(-1, seen.ids[:, None])[:, 0]
            grads = [torch.autograd.grad(each[part].sum(), tokens, retain_graph=True)[0][0] for part in seen.parts]
        shares = torch.stack([grad.norm(dim=-1) * tokens[0].norm(dim=-1) for grad in grads])[:, : len(selected)]
    return torch.einsum("sq,qtzyx->stzyx", shares.detach(), selected).reshape(len(shares), *seen.body.shape).numpy()


def ways(seen: Occlusion, base: Baseline, lesions: Maps) -> dict[str, Callable[[], Maps]]:
    rng = np.random.default_rng(0)
    soft = blurred(seen.grid, seen.cells)
    return {
        "occlusion, 2 × 2 × 2 cells, blurred": lambda: occlusion(seen, soft),
        "occlusion, 2 × 2 × 2 cells, mean of training": lambda: occlusion(seen, base.grid),
        "occlusion, single cells, mean of training": lambda: single_cells(seen, base.grid),
        f"integrated gradients, {STEPS} steps": lambda: gradients(seen, base, STEPS),
        "gradient × input": lambda: gradients(seen, base, 1),
        "‖gradient‖·‖token‖ × selection (before)": lambda: selections(seen, True),
        "selection alone": lambda: selections(seen, False),
        "the lesion itself": lambda: lesions + 1e-3 * rng.random(lesions.shape),
    }


# ---- the test


@dataclass(frozen=True)
class Result:
    """Of one way and sentence: falls in log-probability less those of random regions, by fill; whether it points."""

    patient: str
    falls: dict[str, float]
    points: float
    chance: float


def judge(
    seen: Occlusion, patient: str, named: list[np.ndarray], base: Baseline, other: Tensor
) -> dict[str, list[Result]]:
    """Every way's results, a sentence each; `named` are the lesions that these name."""
    rng = np.random.default_rng(0)
    maps = {name: way() for name, way in ways(seen, base, np.stack(named).astype(float)).items()}
    shown = {name: [top(each, seen.body) for each in found] for name, found in maps.items()}
    controls = [region(seen.body, rng, int(next(iter(shown.values()))[0].sum())) for _ in range(CONTROLS)]
    regions = [each for found in shown.values() for each in found] + controls
    fills = dict(zip(FILLS, (blurred(seen.grid, seen.cells), base.grid, other), strict=True))
    drops = {fill: seen.drops(regions, grid) for fill, grid in fills.items()}
    results: dict[str, list[Result]] = {}
    for number, (name, found) in enumerate(maps.items()):
        results[name] = []
        for i, (weights, lesion) in enumerate(zip(found, named, strict=True)):
            at = number * len(named) + i
            falls = {fill: float(fell[at, i] - fell[-CONTROLS:, i].mean()) for fill, fell in drops.items()}
            peak = np.unravel_index(np.where(seen.body, weights, -np.inf).argmax(), weights.shape)
            results[name].append(Result(patient, falls, float(lesion[peak]), float(lesion[seen.body].mean())))
    return results


def table(results: dict[str, list[Result]]) -> Table:
    made = Table("", "sentences", *(f"log p, {fill}" for fill in FILLS), "points at the lesion", "by chance")
    for name, found in results.items():
        bootstrap = Bootstrap([each.patient for each in found])
        falls = [shown(bootstrap.mean([each.falls[fill] for each in found])) for fill in FILLS]
        points = shown(bootstrap.mean([each.points for each in found]))
        made.add_row(name, str(len(found)), *falls, points, f"{np.mean([each.chance for each in found]):.2f}")
    return made


def shown(estimate: Estimate | None) -> str:
    assert estimate is not None
    return f"{estimate.value:.2f} ({estimate.low:.2f}…{estimate.high:.2f})"


def true_sentences(report: str, case: Case) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
    """Places of the sentences that name findings that are there, and their lesions."""
    places, lesions = [], []
    for span in spans(report):
        said = findings(span.text)
        there = [mask for key, mask in case.lesions.items() if any(key == (each.name, each.side) for each in said)]
        if there:
            places.append((span.start, span.end))
            lesions.append(np.logical_or.reduce(there))
    return places, lesions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="of preset demo: its patches are cells")
    parser.add_argument("--phantoms", type=int, default=30)
    parser.add_argument("--seed", type=int, default=12, help="of the phantoms")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load(options.checkpoint)
    spec, evaluation = processor.spec, open_checkpoint(options.checkpoint).experiment["evaluation"]
    mean = (model.model.vision.anatomy.mean * 255).round().to(torch.uint8)  # (T, C, K, H, W)
    every = torch.ones(1, spec.chunks, dtype=torch.bool)
    with torch.no_grad():
        base = Baseline(torch.from_numpy(whole(mean.numpy(), spec)), model.encode_vision(mean[None], every))
    DiagnosticPrior.probabilities = DiagnosticPrior.probabilities.__wrapped__  # lets gradients through
    results: dict[str, list[Result]] = defaultdict(list)
    reader, console = Reader(model, processor, batch_size=32), Console(width=220)
    for number in range(options.phantoms):
        case = case_of(options.seed, number, spec)
        other = torch.from_numpy(whole(case_of(options.seed + 1, number, spec).scan.voxels, spec))
        prompt = Prompt(evaluation["question"], "a", Decoding(evaluation["max_new_tokens"]))
        with torch.no_grad():
            features = model.encode_vision(torch.from_numpy(case.scan.voxels)[None], every)
            report = write(ContinuousDecoder(model, processor), features, every, [prompt])[0][0].text
        places, lesions = true_sentences(report, case)
        if places:
            answer = Answer(evaluation["question"], report, places)
            seen = Occlusion(reader, case.scan.voxels, case.scan.chunk_mask, answer)
            for name, found in judge(seen, case.patient, lesions, base, other).items():
                results[name] += found
    patients = {each.patient for found in results.values() for each in found}
    console.print(f"{options.phantoms} phantoms of seed {options.seed}; {len(patients)} patients with such sentences")
    console.print(table(results))


if __name__ == "__main__":
    main()

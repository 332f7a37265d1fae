"""Which findings a phantom has: in a fixed share of the cases, as often left as right, none hiding another."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mu2llm.ct import lidc
from mu2llm.ct.lidc import Shape
from mu2llm.ct.phantom.anatomy import VERTEBRAE
from mu2llm.records import Finding, Side

FINDINGS: dict[str, bool] = {
    "pleural effusion": True,
    "pneumothorax": True,
    "consolidation": True,
    "lung nodule": True,
    "pericardial effusion": False,
    "liver lesion": False,
    "renal cyst": True,
    "vertebral sclerosis": False,
}
"""The findings by name, and whether each has a side."""

SIZES_MM = {"lung nodule": (25, 30, 35), "liver lesion": (50, 55, 60), "renal cyst": (45, 50, 55)}
LOBES: dict[Side, tuple[str, ...]] = {
    "right": ("upper lobe", "middle lobe", "lower lobe"),
    "left": ("upper lobe", "lower lobe"),
}
NODULES = ("balls", "lidc")  # what the lung nodules are
NODULE = "lung nodule"
BLOCK = 20  # consecutive cases over which the share of each finding is exact


@dataclass(frozen=True)
class Planted:
    """A finding as it is drawn: how much of it (0 to 1), where within the reach of its place (-1 to 1 each way), and
    the shape of a nodule that someone had."""

    finding: Finding
    extent: float
    spot: tuple[float, float, float]
    shape: Shape | None = None

    @property
    def radius(self) -> float:
        """Half of its diameter in mm; 0 for what is not measured."""
        return (self.finding.size_mm or 0) / 2


Plan = Mapping[str, Planted]


def draw_plan(seed: int, index: int, prevalence: float, nodules: str = "balls") -> Plan:
    """The findings of phantom `index` of a seed by name, in the order of `FINDINGS`."""
    plan: dict[str, Planted] = {}
    for number, name in enumerate(FINDINGS):
        side = _side_if_present(np.random.default_rng([seed, index // BLOCK, 10 + number]), index % BLOCK, prevalence)
        if side:
            rng = np.random.default_rng([seed, index, 10 + number])
            finding = _finding(name, side, plan, rng)
            u, v, w = (float(value) for value in rng.uniform(-1, 1, 3))
            plan[name] = Planted(finding, float(rng.uniform()), (u, v, w))
            if name == NODULE and nodules == "lidc":
                plan[name] = _with_shape(plan[name], rng)
    return plan


def _with_shape(item: Planted, rng: np.random.Generator) -> Planted:
    """The same finding, but of the size and shape of one of LIDC's solid nodules."""
    numbers = _solid()
    shape = None
    while shape is None:  # a few outlines hold nothing
        shape = lidc.shape(lidc.database(), numbers[int(rng.integers(len(numbers)))])
    finding = item.finding.model_copy(update={"size_mm": float(round(shape.size_mm))})
    return replace(item, finding=finding, shape=shape)


@functools.lru_cache(maxsize=1)
def _solid() -> list[int]:
    return lidc.solid(lidc.database())


def _side_if_present(rng: np.random.Generator, position: int, prevalence: float) -> Side | None:
    """The side of a finding (either, where it has none) if the case at `position` of its block is one that has it."""
    count = int(BLOCK * prevalence + rng.uniform())
    turn = int(rng.integers(2))
    rank = int(rng.permutation(BLOCK)[position])
    if rank >= count:
        return None
    return "left" if (rank + turn) % 2 else "right"


def _finding(name: str, side: Side, plan: Plan, rng: np.random.Generator) -> Finding:
    size = _pick(SIZES_MM[name], rng) if name in SIZES_MM else None
    if name == "vertebral sclerosis":
        return Finding(name=name, place=_pick(VERTEBRAE[5:14], rng))
    if name not in ("consolidation", "lung nodule"):
        return Finding(name=name, side=side if FINDINGS[name] else None, size_mm=size)
    free = _free_lobes(side, plan)
    if not free:
        side = "right" if side == "left" else "left"
        free = _free_lobes(side, plan)
    return Finding(name=name, side=side, place=_pick(free, rng), size_mm=size)


def _free_lobes(side: Side, plan: Plan) -> tuple[str, ...]:
    """The lobes of a lung that neither fluid nor consolidation fills."""
    taken = {item.finding.place for item in plan.values() if item.finding.side == side}
    effusion = plan.get("pleural effusion")
    if effusion and effusion.finding.side == side:
        taken.add("lower lobe")
    return tuple(lobe for lobe in LOBES[side] if lobe not in taken)


def _pick(choices: tuple[Any, ...], rng: np.random.Generator) -> Any:
    return choices[int(rng.integers(len(choices)))]

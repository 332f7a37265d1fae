"""One patient's measures, drawn at random within the range of adults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGN = {"right": 1.0, "left": -1.0}
VERTEBRAE = (*(f"T{n}" for n in range(1, 13)), *(f"L{n}" for n in range(1, 5)))

HU: dict[str, tuple[float, float]] = {
    "fat": (-112, -95),
    "muscle": (48, 62),
    "lung": (-875, -835),
    "liver": (112, 128),
    "spleen": (112, 135),
    "kidney": (170, 195),
    "blood": (165, 215),
    "myocardium": (95, 115),
    "bone": (180, 230),
    "rib": (330, 460),
}
"""Range of each tissue's density after contrast, portal venous phase."""


@dataclass(frozen=True)
class Anatomy:
    """Lengths in mm, densities in HU. The scan reaches from the fourth lumbar vertebra to the shoulders."""

    width: float  # half, to the outside of the muscle
    depth: float
    wall: float
    fat: float
    breast: float
    length: float
    dome: float  # height of the right dome of the diaphragm
    heart: float  # sizes of organs relative to the average
    kidney: float
    organ: float
    scoliosis: float
    kyphosis: float
    arms: bool  # beside the body rather than raised
    hu: Mapping[str, float]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Anatomy:
        u = rng.uniform
        return cls(
            width=u(145, 172),
            depth=u(98, 116),
            wall=u(13, 18),
            fat=u(8, 34),
            breast=u(14, 26) if u() < 0.5 else 0,
            length=u(385, 435),
            dome=u(180, 205),
            heart=u(0.9, 1.12),
            kidney=u(0.9, 1.12),
            organ=u(0.92, 1.08),
            scoliosis=u(-6, 6),
            kyphosis=u(2, 8),
            arms=bool(u() < 0.1),
            hu={tissue: u(low, high) for tissue, (low, high) in HU.items()},
        )

    @property
    def a(self) -> float:
        """Half width of the cavity of chest and abdomen."""
        return self.width - self.wall

    @property
    def b(self) -> float:
        """Half depth of the cavity."""
        return self.depth - self.wall

    @property
    def hilum(self) -> float:
        """Height of the middle of the lungs."""
        return (self.dome + self.length) / 2 - 5

    def spine(self, z: Any) -> tuple[Any, Any]:
        """Centre (x, y) of the vertebral bodies at height z."""
        t = z / self.length
        return self.scoliosis * np.sin(3 * t), 27 - self.b + self.kyphosis * np.sin(2 * np.pi * t + 0.4)

    def discs(self) -> NDArray[np.float64]:
        """Heights of the discs above T1, between the vertebrae and below L4, from the top of the scan down to 0."""
        heights = np.concatenate([np.linspace(20, 27, 12), np.linspace(29, 33, 4)])
        return self.length * (1 - np.concatenate([[0.0], np.cumsum(heights)]) / heights.sum())

    def taper(self, z: Any) -> Any:
        """How much narrower the chest is at height z than at its base: 1 down to about 0.5."""
        t = np.clip((z / self.length - 0.7) / 0.34, 0, 1)
        return 1 - 0.5 * t * t * (3 - 2 * t)

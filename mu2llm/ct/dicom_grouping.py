"""The slices of one DICOM series → the scans in it: first by what the files say of themselves, then by geometry.

A series may hold several phases, time points or reconstructions of the same region, which are scans of their own, or
several stations of one scan. Values of a tag that differ tell scans apart only where their slices cover the same
region; what follows one another is one scan.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from mu2llm.ct.dicom_headers import CLUES, WEAK_CLUES, Slice
from mu2llm.ct.geometry import SAME_PLACE_MM, has_even_steps, same_place_mm

_ENOUGH = 3  # slices that show that steps are even
_BORDER_MM = 0.1  # slices of two stations no farther apart are at the same place

Placed = list[tuple[float, Slice]]  # ascending places (mm) along the slices' normal


@dataclass(frozen=True)
class Group:
    """Slices that are not told apart yet."""

    placed: Placed
    stations: bool = False


@dataclass(frozen=True)
class Scan:
    """Slices of one grid that make one scan; whether they come from stations that share slices at their borders."""

    slices: list[Slice]
    stations: bool = False


def scans(slices: list[Slice]) -> list[Scan]:
    """The scans in the slices of one series, in the order of their acquisition where the files tell it."""
    found: list[Scan] = []
    for grid in _by_grid(slices):
        if any(each.position is None for each in grid):
            found.append(Scan(grid))
            continue
        groups = [Group(place(grid))]
        for index, name in enumerate(CLUES):
            groups = [part for group in groups for part in _split(group, index, name in WEAK_CLUES)]
        for group in groups:
            found += [Scan([each for _, each in part], group.stations) for part in _interleaved(group.placed)]
    return found


def normal(each: Slice) -> np.ndarray:
    """The unit normal (LPS) of a slice, upwards of an axial one; of one without orientation that of an axial one."""
    if each.orientation is None:
        return np.array([0.0, 0.0, 1.0])
    across = np.cross(each.orientation[:3], each.orientation[3:])
    return np.asarray(across / (np.linalg.norm(across) or 1.0))


def place(slices: list[Slice]) -> Placed:
    """Slices with their places along the first one's normal, ascending; those without a position are left out."""
    along = normal(slices[0])
    placed = [(float(np.dot(each.position, along)), each) for each in slices if each.position is not None]
    return sorted(placed, key=lambda item: (item[0], item[1].part.name, item[1].frame))


def _by_grid(slices: list[Slice]) -> list[list[Slice]]:
    grids: list[list[Slice]] = []
    for each in slices:
        grid = next((grid for grid in grids if share_grid(grid[0], each)), None)
        grids.append([each]) if grid is None else grid.append(each)
    return grids if len(grids) == 1 else sorted(grids, key=lambda grid: min(map(_rank, grid)))


def _rank(each: Slice) -> tuple[Any, ...]:
    """What puts grids in order, whatever the order of the files."""
    return (
        [_natural(value) for value in each.clues],
        each.rows,
        each.columns,
        each.spacing or (),
        each.orientation or (),
    )


def share_grid(one: Slice, other: Slice) -> bool:
    """Whether two slices have the same matrix, pixel spacing and directions."""
    if (one.rows, one.columns, one.projection) != (other.rows, other.columns, other.projection):
        return False
    return _are_close(one.orientation, other.orientation, 0.02) and _are_close(one.spacing, other.spacing, 0.001)


def _are_close(one: tuple[float, ...] | None, other: tuple[float, ...] | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= tolerance


def _split(group: Group, clue: int, weak: bool) -> list[Group]:
    """A group by the values of one clue: those that cover the same region apart, those that follow one another
    together. As it was where the values tell nothing, since they change at random or tear a regular grid apart."""
    values: dict[str, Placed] = defaultdict(list)
    for item in group.placed:
        values[item[1].clues[clue]].append(item)
    if len(values) == 1:
        return [group]
    runs = _runs([values[value] for value in sorted(values, key=_natural)])
    if len(runs) > len(group.placed) / _ENOUGH:
        return [group]
    chains = _chains(runs)
    if len(chains) > 1:
        regular = _is_even(group.placed)
        largest = max((chain.placed for chain in chains), key=len)
        if regular and not all(len(chain.placed) >= _ENOUGH and _is_even(chain.placed) for chain in chains):
            return [group]
        if weak and not (len(largest) >= _ENOUGH and _is_even(largest)):
            return [group]
    return [Group(chain.placed, chain.stations or group.stations) for chain in chains]


def _natural(value: str) -> tuple[float, str]:
    """Numbers by their value, before text."""
    try:
        return float(value), ""
    except ValueError:
        return np.inf, value


def _is_even(group: Placed) -> bool:
    return len(group) > 1 and has_even_steps(np.array([at for at, _ in group]))


def _runs(parts: list[Placed]) -> list[Placed]:
    """Successive parts that go on in one direction, each the next step beyond the ones before, put together."""
    runs: list[Placed] = []
    direction = 0
    for part in parts:
        if runs and direction >= 0 and _is_next(runs[-1], part):
            runs[-1], direction = runs[-1] + part, 1
        elif runs and direction <= 0 and _is_next(part, runs[-1]):
            runs[-1], direction = part + runs[-1], -1
        else:
            runs.append(part)
            direction = 0
    return runs


def _is_next(lower: Placed, upper: Placed) -> bool:
    """Whether one run begins a step, as far as that is known, above where the other ends."""
    gap = upper[0][0] - lower[-1][0]
    steps = [step for run in (lower, upper) for step in np.diff([at for at, _ in run[:2]])]
    return gap > SAME_PLACE_MM if not steps else 0.5 * min(steps) < gap < 1.5 * max(steps)


def _chains(runs: list[Placed]) -> list[Group]:
    """Runs that follow one another put together; of slices that two of them share the earlier run's are kept."""
    chains: list[list[Placed]] = []
    kept: list[Placed] = []
    joined: set[int] = set()
    for run in runs:
        for index, chain in enumerate(chains):
            shared = [mask for mask in (_shared(other, run) for other in chain) if mask is not None]
            if len(shared) == len(chain):
                rest = [item for item, there in zip(run, np.any(shared, axis=0), strict=True) if not there]
                chain.append(run)
                kept[index] = kept[index] + rest
                joined |= {index} if len(rest) < len(run) else set()
                break
        else:
            chains.append([run])
            kept.append(run)
    return [Group(sorted(placed, key=lambda item: item[0]), index in joined) for index, placed in enumerate(kept)]


def _shared(one: Placed, other: Placed) -> np.ndarray | None:
    """Which slices of `other` are at places of `one`, if it is a station that follows or precedes it: a few at their
    common border, or none. None where both cover the same region."""
    places, others = (np.array([at for at, _ in group]) for group in (one, other))
    step = float(np.median(np.diff(places))) if len(places) > 1 else 0.0
    near = max(SAME_PLACE_MM, min(_BORDER_MM, step / 4))
    low, high = max(places[0], others[0]) - near, min(places[-1], others[-1]) + near
    inner, shared = (places >= low) & (places <= high), (others >= low) & (others <= high)
    if high < low or not (inner.any() or shared.any()):
        return np.zeros(len(others), bool)
    if inner.sum() != shared.sum() or np.abs(places[inner] - others[shared]).max() > near:
        return None
    count, fewest = int(shared.sum()), min(len(one), len(other))
    return None if count * _ENOUGH > fewest and not count == 1 < fewest else shared


def _interleaved(group: Placed) -> list[Placed]:
    """Two regular grids of the same step whose slices alternate, each by itself; else the group as it was."""
    places = np.array([at for at, _ in group])
    if len(places) < 2 * _ENOUGH or has_even_steps(places) or np.diff(places).min() < same_place_mm(places):
        return [group]
    step = float(np.median(places[2:] - places[:-2]))
    on = [0]
    for index in range(1, len(places)):
        if abs(places[index] - places[on[-1]] - step) <= 0.1 * step:
            on.append(index)
    off = np.setdiff1d(np.arange(len(places)), on)
    grids = [places[on], places[off]]
    if min(map(len, grids)) < _ENOUGH or not all(map(has_even_steps, grids)):
        return [group]
    if abs((grids[1][0] - grids[0][0]) / step % 1 - 0.5) < 0.05:  # one grid of half the step that lacks slices
        return [group]
    if abs(np.diff([np.diff(grid).mean() for grid in grids])[0]) > 0.02 * step or grids[1][0] > grids[0][-1]:
        return [group]
    return [[group[index] for index in indices] for indices in (on, off)]

"""What a text depended on in a scan: by how much the log-probability of its sentences falls where a part of the scan is
taken away (occlusion, Zeiler and Fergus 2014, arXiv 1311.2901). Forward passes only.

A scan's grid is cut into cells, at most `CELLS` along each axis. Windows of 2 × 2 × 2 cells are taken away one after
the other, and a cell weighs the mean of what its windows cost. Taken away means made as it mostly is there, which
leaves no hole that no scan has: filled from the mean of the training scans, which a checkpoint with mean-image
subtraction keeps, else from the scan blurred. Both pass the deletion test of tests/benchmarks/bench_saliency.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes
from torch import Tensor
from torch.nn import functional

from mu2llm import ct
from mu2llm.engine.loading import numerics
from mu2llm.model import Mu2ForConditionalGeneration, Mu2Processor
from mu2llm.settings.inference import Precision

CELLS = 8
FINE = 4
"""Parts of a cell along each axis, by which the body's outline is drawn."""
SHOWN = 0.05
"""The share of the body's cells that is shown: those that a sentence hangs on most."""
LEAST = 0.1
"""Nats by which a sentence's log-probability falls at least where it hangs on a region: it is a tenth less likely."""
CONTROLS = 8
"""Random regions of the same size that the shown one is compared with."""
Cells = tuple[int, int, int]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Reader:
    """A model, and how it runs."""

    model: Mu2ForConditionalGeneration
    processor: Mu2Processor
    precision: Precision = "fp32"
    batch_size: int = 8


@dataclass(frozen=True)
class Answer:
    """A report on a question, and its sentences, at least one: characters from … to."""

    question: str
    report: str
    sentences: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Influence:
    """Of one sentence: `weights` (z, y, x) of the cells, in nats, and `shown`, the region of those that weigh most.

    Without that region the sentence's log-probability falls by `drop`, without random regions of the body of the same
    size by `random` on the mean; it `holds` where none of these costs as much, and it costs `LEAST`.
    """

    weights: NDArray[np.float32]
    shown: Mask
    drop: float
    random: float
    holds: bool


class Occlusion:
    """One answer about one scan: voxels (T, C, K, H, W) and chunk mask (T,) as prepared by the processor's spec. Of
    several series of an examination parts of the first are taken away."""

    def __init__(
        self,
        reader: Reader,
        voxels: np.ndarray,
        chunk_mask: np.ndarray,
        answer: Answer,
        going: Callable[[], bool] = lambda: True,
    ) -> None:
        self.reader, self.spec, self.going = reader, reader.processor.spec, going
        self.device = reader.model.device
        self.voxels = torch.from_numpy(np.ascontiguousarray(voxels))
        self.mask = torch.from_numpy(np.asarray(chunk_mask)).to(self.device)
        self.grid = torch.from_numpy(ct.whole(voxels, self.spec))  # (C, Z, Y, X)
        depth, height, width = (_cells(size) for size in self.spec.grid)
        self.cells = (depth, height, width)
        self.body = _body(self.grid.numpy(), self.cells)
        self._read(answer)
        self.features = self._encode(self.voxels[None], self.mask[None])
        self.logps = self._logps(self.features)[0]

    def influences(self, seed: int = 0) -> list[Influence]:
        """Of each sentence; `seed` draws the random regions."""
        fill = self.fill()
        weights = self.weights(fill)
        shown = [top(each, self.body) for each in weights]
        rng = np.random.default_rng(seed)
        controls = [region(self.body, rng, int(shown[0].sum())) for _ in range(CONTROLS)]
        drops = self.drops([*shown, *controls], fill)
        found = []
        for i, (own, where) in enumerate(zip(weights, shown, strict=True)):
            random = drops[len(shown) :, i]
            holds = bool(drops[i, i] > max(LEAST, float(random.max())))
            found.append(Influence(own, where, float(drops[i, i]), float(random.mean()), holds))
        return found

    def within_outline(self, weights: np.ndarray) -> np.ndarray:
        """Of cells (z, y, x) → of their parts, up to `FINE` along each axis, 0 outside the body."""
        sizes = zip(self.spec.grid, self.cells, strict=True)
        by = [next(n for n in range(FINE, 0, -1) if size // count % n == 0) for size, count in sizes]
        fine = np.kron(weights, np.ones(by, weights.dtype))
        depth, height, width = fine.shape
        return np.where(_body(self.grid.numpy(), (depth, height, width)), fine, 0)

    def fill(self) -> Tensor:
        """What stands for nothing to be seen, (C, Z, Y, X)."""
        anatomy = self.reader.model.model.vision.anatomy
        if anatomy is None:
            return blurred(self.grid, self.cells)
        mean = anatomy.mean.float().cpu() * (1 if self.grid.is_floating_point() else 255)
        return torch.from_numpy(ct.whole(mean.numpy(), self.spec))

    def weights(self, fill: Tensor) -> NDArray[np.float32]:
        """(sentences, z, y, x): by how much each log-probability falls, on the mean over a cell's windows, where these
        are filled from `fill` (C, Z, Y, X). Outside the body 0."""
        windows = list(_windows(self.body))
        drops = self.drops(windows, fill)
        weights = np.einsum("ws,wzyx->szyx", drops, windows) / np.maximum(np.sum(windows, axis=0), 1)
        return np.where(self.body, weights, 0).astype(np.float32)

    def drops(self, regions: Sequence[Mask], fill: Tensor) -> NDArray[np.float32]:
        """Regions of cells, each (z, y, x) → (regions, sentences): by how much each log-probability falls without."""
        size = self.reader.batch_size
        found = [self._drops(regions[at : at + size], fill) for at in range(0, len(regions), size)]
        return np.concatenate(found)

    def _drops(self, regions: Sequence[Mask], fill: Tensor) -> NDArray[np.float32]:
        if not self.going():
            raise CancelledError
        where = torch.from_numpy(np.stack(regions))
        for axis, size in zip((1, 2, 3), self.spec.grid, strict=True):
            where = where.repeat_interleave(size // where.shape[axis], dim=axis)
        like = fill if self.grid.is_floating_point() else fill.round().clamp(0, 255)
        scans = torch.where(where[:, None], like.to(self.grid.dtype), self.grid)
        tiles = torch.from_numpy(ct.tiled(scans.numpy(), self.spec))  # (B, chunks, C, K, H, W)
        voxels = self.voxels.expand(len(tiles), *self.voxels.shape).clone()
        voxels[:, : tiles.shape[1]] = tiles
        return (self.logps - self._logps(self._encode_changed(voxels))).cpu().numpy()

    def _encode_changed(self, voxels: Tensor) -> Tensor:
        """Scans (B, T, …) → features (B, T, n, E); of the chunks that are as they were they are known."""
        changed = (voxels != self.voxels).flatten(2).any(2).to(self.device) & self.mask
        all_anew = ~changed.any(1, keepdim=True)  # a scan must have a chunk
        if self.reader.model.config.vision.chunks_see_each_other:
            all_anew = torch.ones_like(all_anew)
        changed |= all_anew & self.mask
        return torch.where(changed[..., None, None], self._encode(voxels, changed), self.features)

    def _encode(self, voxels: Tensor, mask: Tensor) -> Tensor:
        with numerics(self.device, self.reader.precision):
            return self.reader.model.encode_vision(voxels.to(self.device), mask)

    def _read(self, answer: Answer) -> None:
        """The prompt's and the report's tokens, and which of these each sentence has."""
        processor = self.reader.processor
        self.prompt = {name: ids.to(self.device) for name, ids in processor.encode([answer.question]).items()}
        told = processor.tokenizer(
            answer.report, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        self.ids = torch.tensor(told.input_ids, device=self.device)
        self.parts = [
            [i for i, (start, end) in enumerate(told.offset_mapping) if start < last and end > first]
            for first, last in answer.sentences
        ]

    def _logps(self, features: Tensor) -> Tensor:
        """Features (B, T, n, E) → each sentence's log-probability (B, sentences)."""
        model, rows = self.reader.model, len(features)
        text = torch.cat([self.prompt["input_ids"], self.ids[None]], dim=1).expand(rows, -1)
        question = {name: self.prompt[name].expand(rows, -1) for name in ("question_ids", "question_mask")}
        with numerics(self.device, self.reader.precision):
            outputs = model(
                input_ids=text,
                vision_features=features,
                chunk_mask=self.mask.expand(rows, -1),
                logits_to_keep=len(self.ids) + 1,
                use_cache=False,
                **question,
            )
            logps = outputs.logits[:, :-1].float().log_softmax(-1)
            each = logps.gather(-1, self.ids.expand(rows, -1)[..., None])[..., 0]
            return torch.stack([each[:, part].sum(1) for part in self.parts], dim=1)


def top(weights: np.ndarray, body: Mask, share: float = SHOWN) -> Mask:
    """The cells of the body that weigh most, that share of them."""
    count = max(1, round(share * body.sum()))
    order = np.argsort(np.where(body, weights, -np.inf), axis=None)[::-1]
    shown = np.zeros(body.size, bool)
    shown[order[:count]] = True
    return shown.reshape(body.shape) & body


def region(body: Mask, rng: np.random.Generator, count: int) -> Mask:
    """So many cells of the body about one that is drawn: a region in one piece, as a lesion is."""
    places = np.argwhere(body)
    apart = np.linalg.norm(places - places[rng.integers(len(places))], axis=1)
    drawn = np.zeros(body.shape, bool)
    drawn[tuple(places[np.argsort(apart, kind="stable")[:count]].T)] = True
    return drawn


def blurred(grid: Tensor, cells: Cells) -> Tensor:
    """(C, Z, Y, X) → the same shape: each place's mean over 3 × 3 × 3 cells about it."""
    coarse = functional.adaptive_avg_pool3d(grid[None].float(), cells)
    around = functional.avg_pool3d(coarse, 3, stride=1, padding=1, count_include_pad=False)
    return functional.interpolate(around, size=grid.shape[1:], mode="trilinear", align_corners=False)[0]


def _cells(size: int) -> int:
    return next(count for count in range(min(CELLS, size), 0, -1) if size % count == 0)


def _windows(body: Mask) -> Iterator[Mask]:
    """Those that hold any of the body."""
    for start in itertools.product(*(range(max(1, size - 1)) for size in body.shape)):
        window = np.zeros(body.shape, bool)
        window[tuple(slice(at, at + 2) for at in start)] = True
        if (window & body).any():
            yield window


def _body(grid: np.ndarray, cells: Cells) -> Mask:
    """(C, Z, Y, X) → the cells that are patient for the most part: what is denser than Otsu's threshold, and what that
    encloses in its plane (lungs, bowel gas). Where nothing is, all."""
    dense = grid.mean(0, dtype=np.float32)
    filled = np.stack([binary_fill_holes(plane > _otsu(dense)) for plane in dense])
    share = functional.adaptive_avg_pool3d(torch.from_numpy(filled).float()[None, None], cells)[0, 0].numpy()
    body: Mask = share >= 0.5
    return body if body.any() else np.ones_like(body)


def _otsu(values: np.ndarray) -> float:
    """Between the two groups of values whose means are farthest apart for their sizes (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=256)
    middles = (edges[1:] + edges[:-1]) / 2
    below, total = np.cumsum(counts), np.cumsum(counts * middles)
    above = below[-1] - below
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(edges[1:][np.nanargmax(apart)]) if np.isfinite(apart).any() else float(edges[0])

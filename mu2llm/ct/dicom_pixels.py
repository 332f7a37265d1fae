"""Slices → their stored values, decoded by pydicom (pylibjpeg's decoders), with their scaling and padding; and HU."""

from __future__ import annotations

import itertools
import warnings as python_warnings
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder, iter_pixels
from pydicom.uid import UID, RLELossless, UncompressedTransferSyntaxes

from mu2llm.ct.codes import MAX_VOXELS
from mu2llm.ct.dicom_headers import Slice, first_line
from mu2llm.ct.hounsfield import Padding, apply_table, to_hu
from mu2llm.errors import Rejection

# what is cut off is padding; said once a slice otherwise
python_warnings.filterwarnings("ignore", "The decoded RLE segment contains non-conformant padding")


def check_decodable(slices: list[Slice], uri: str) -> None:
    """Rejects what is too large, or in a transfer syntax that no installed decoder knows."""
    voxels = sum(each.rows * each.columns for each in slices)
    if voxels > MAX_VOXELS:
        raise Rejection(uri, "too_large", f"{voxels} voxels; a scan has at most {MAX_VOXELS}")
    for syntax in {each.syntax for each in slices} - {UID("")} - set(UncompressedTransferSyntaxes):
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            available = False
        if not available:
            raise Rejection(uri, "undecodable", f"no decoder for transfer syntax {syntax.name} ({syntax})")


def decode(slices: list[Slice], uri: str, table: tuple[float, float] | None) -> tuple[np.ndarray, set[str]]:
    """Slices → HU (n, rows, columns), int16 or float32, and warning codes; `table` is a metadata table's rescale.

    Rejection: `corrupt`, `undecodable`."""
    warnings = set()
    planes = np.empty((len(slices), slices[0].rows, slices[0].columns), np.int16)
    paddings: list[Padding | None] = [None] * len(slices)
    for done, (index, pixels, padding) in enumerate(stored(slices, uri)):
        if pixels.dtype != planes.dtype:
            planes = planes.astype(pixels.dtype if done == 0 else np.promote_types(planes.dtype, pixels.dtype))
        planes[index], paddings[index] = pixels, padding
    if any(each.slope is None or each.intercept is None for each in slices):
        warnings.add("no_rescale")
    scalings = [(1.0 if each.slope is None else each.slope, each.intercept or 0.0) for each in slices]
    scalings, table_warnings = apply_table(planes, scalings, table, paddings)
    hu, scaling_warnings = to_hu(planes, scalings, paddings)
    return hu, warnings | table_warnings | scaling_warnings


def stored(slices: list[Slice], uri: str) -> Iterator[tuple[int, np.ndarray, Padding | None]]:
    """For each slice, file by file: its index, its stored values (rows, columns), and its padding values."""
    files: dict[int, list[int]] = defaultdict(list)
    for index, each in enumerate(slices):
        files[id(each.part)].append(index)
    plugin = ""
    for indices in files.values():
        each = slices[indices[0]]
        dataset = each.dataset(uri)
        frames = [slices[index].frame for index in indices]
        try:
            if each.syntax == RLELossless and (plugin or _runs_over(dataset)):
                plugin = "pydicom"
            planes = iter_pixels(dataset, indices=frames if each.frames > 1 else None, decoding_plugin=plugin)
            for index, pixels in zip(indices, planes, strict=True):
                if pixels.shape != (each.rows, each.columns):
                    raise Rejection(uri, "corrupt", f"{each.part.name}: pixels of shape {pixels.shape}")
                yield index, pixels, _padding(dataset, pixels.dtype)
        except Rejection:
            raise
        except BaseException as error:  # pydicom and its decoders raise many kinds
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # the RLE decoder's, Rust
                raise
            reason = "corrupt" if each.syntax in UncompressedTransferSyntaxes else "undecodable"
            syntax = f"transfer syntax {each.syntax.name} ({each.syntax})"
            raise Rejection(uri, reason, f"{each.part.name}, {syntax}: {first_line(error)}") from error


def _runs_over(dataset: pydicom.Dataset) -> bool:
    """Whether the first frame's RLE segments decode to more than its pixels, which pylibjpeg's decoder panics at."""
    frame = get_frame(dataset.PixelData, 0, number_of_frames=int(dataset.get("NumberOfFrames") or 1))
    count = int.from_bytes(frame[:4], "little")
    starts = [int.from_bytes(frame[4 * n : 4 * n + 4], "little") for n in range(1, min(count, 15) + 1)]
    sizes = [_decoded_size(frame[start:end]) for start, end in itertools.pairwise([*starts, len(frame)])]
    return max(sizes, default=0) > dataset.Rows * dataset.Columns


def _decoded_size(segment: bytes) -> int:
    """Bytes that a PackBits segment decodes to (PS3.5 G.3.2)."""
    size = at = 0
    while at + 1 < len(segment):
        code = segment[at]
        size += code + 1 if code < 128 else 257 - code if code > 128 else 0
        at += code + 2 if code < 128 else 2 if code > 128 else 1
    return size


def _padding(dataset: pydicom.Dataset, dtype: np.dtype) -> Padding | None:
    """From PixelPaddingValue to PixelPaddingRangeLimit, as the pixels hold them: files disagree on the sign."""
    value = _as_pixel(dataset.get("PixelPaddingValue"), dtype)
    if value is None:
        return None
    limit = _as_pixel(dataset.get("PixelPaddingRangeLimit"), dtype)
    return (value, value) if limit is None else (min(value, limit), max(value, limit))


def _as_pixel(value: object, dtype: np.dtype) -> int | None:
    if not isinstance(value, int):
        return None
    bits = 8 * dtype.itemsize
    stored = int(value) % 2**bits
    return stored - 2**bits if dtype.kind == "i" and stored >= 2 ** (bits - 1) else stored

"""A DICOM series → CTVolume, classic slices and the frames of enhanced objects alike, put on one straight grid."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from mu2llm.ct import dicom_headers, geometry
from mu2llm.ct.dicom_headers import Slice
from mu2llm.ct.dicom_pixels import check_decodable, decode
from mu2llm.ct.dicom_series import choose, of_examination
from mu2llm.ct.dicom_stack import directions, leftovers, order
from mu2llm.ct.sources import DICOM, Part
from mu2llm.ct.volume import CTVolume, admit, build, usable, warned
from mu2llm.errors import Rejection

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_OFF_THE_LINE_MM = 1.0


def read(
    parts: list[Part],
    uri: str,
    series: str | None = None,
    rescale: tuple[float, float] | None = None,
    accept: frozenset[str] = frozenset(),
) -> CTVolume:
    """Files of a folder, zip or list → the CTVolume of one scan among them; as `mu2llm.ct.read`."""
    return _read(*dicom_headers.parse(parts, uri), uri, series, rescale, accept)


def read_several(
    parts: list[Part],
    uri: str,
    most: int,
    rescale: tuple[float, float] | None = None,
    accept: frozenset[str] = frozenset(),
) -> list[CTVolume]:
    """The same files → the CTVolumes of at most so many series of one examination; as `mu2llm.ct.read_several`."""
    slices, warnings = dicom_headers.parse(parts, uri)

    def volume(of_series: list[Slice]) -> CTVolume:
        return admit(_read(of_series, set(warnings), uri, None, rescale, accept), accept)

    members = of_examination(slices, uri)
    volumes = usable((partial(volume, each) for each in members), most)
    read = {each.series for each in volumes}
    names = [{each.series for each in of_series} for of_series in members]
    left = {each.series for each in slices}.difference(*(each for each in names if each & read))
    return [warned(volumes[0], "files_set_aside"), *volumes[1:]] if left else volumes


def _read(
    slices: list[Slice],
    warnings: set[str],
    uri: str,
    series: str | None,
    rescale: tuple[float, float] | None,
    accept: frozenset[str],
) -> CTVolume:
    choice = choose(slices, uri, series, accept)
    chosen = choice.slices
    warnings |= choice.warnings
    check_decodable(chosen, uri)
    if not chosen[0].modality:
        warnings.add("no_modality")
    axes, assumed = directions(chosen[0], uri, accept)
    if assumed:
        warnings.add("orientation_assumed")
    ordered, origins, order_warnings = order(chosen, uri)
    warnings |= order_warnings | leftovers(ordered, choice.left, uri)
    return replace(_stack(ordered, axes, origins, uri, warnings, rescale), others=choice.others)


def _stack(
    slices: list[Slice],
    axes: np.ndarray,
    origins: np.ndarray,
    uri: str,
    warnings: set[str],
    rescale: tuple[float, float] | None,
) -> CTVolume:
    """Ordered slices → volume, at equal steps. `axes` (2, 3) are directions along a row and a column, LPS."""
    places = origins @ np.cross(axes[0], axes[1])
    geometry.check_gaps(places, uri)
    drift, start = np.polynomial.polynomial.polyfit(places - places[0], origins, 1)[::-1]  # per mm along the normal
    if np.abs(origins - start - np.outer(places - places[0], drift)).max() > _OFF_THE_LINE_MM:
        raise Rejection(uri, "irregular_positions", "the slices' origins do not lie on one line")
    even = geometry.has_even_steps(places)
    if not even:
        geometry.check_even_count(places, uri)
    hu, decode_warnings = decode(slices, uri, rescale)
    if even:
        places = geometry.fitted_places(places)
    else:
        hu, places = geometry.even_steps(hu, places)
        decode_warnings.add("gap_resampled")
    between_rows, between_columns = slices[0].spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0] = axes[0] * between_columns
    affine[:3, 1] = axes[1] * between_rows
    affine[:3, 2] = drift * (places[-1] - places[0]) / (len(places) - 1)
    affine[:3, 3] = origins[0]
    return build(
        hu.transpose(2, 1, 0),
        _LPS_TO_RAS @ affine,
        uri,
        warnings | decode_warnings,
        format=DICOM,
        modality=slices[0].modality,
        series=slices[0].series,
    )

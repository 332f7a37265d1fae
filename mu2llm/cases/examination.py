"""The series of a case: brought here, and read in HU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mu2llm import ct, storage
from mu2llm.errors import Rejection
from mu2llm.records import Case, Series
from mu2llm.settings.data import DataConfig


def fetched(case: Case, folder: Path) -> list[Path]:
    """The series of a case as local paths, each place fetched once; Rejection where one is not there."""
    places = list(dict.fromkeys(each.volume for each in case.every_series))
    local = {place: fetch(place, folder / str(number)) for number, place in enumerate(places)}
    return [local[each.volume] for each in case.every_series]


def fetch(uri: str, folder: Path) -> Path:
    """A scan as a local path: itself if it is local, else copied below `folder`; Rejection where it is not there."""
    if not storage.is_remote(uri):
        return Path(storage.resolve(uri)[1])
    local = folder / uri.rstrip("/").rsplit("/", 1)[-1]
    try:
        storage.copy(uri, str(local))
    except FileNotFoundError:
        raise Rejection(uri, "not_found", "there is nothing under this path or URI") from None
    return local


def volumes(case: Case, sources: list[Path], data: DataConfig) -> tuple[Case, list[ct.CTVolume]]:
    """The series of a case in HU. Where they are to be put together (`data.together`) a place without names of series
    gives all that are read of an examination, which the case then names, and what cannot be used is passed over."""
    if data.together and not case.further and case.series is None:
        most, rescale, accept = data.spec.series, case.rescale, data.accept
        read = partial(ct.read_several, sources[0], most, rescale=rescale, accept=accept)
        found = storage.retried(case.volume, read)
        named = [Series(volume=case.volume, series=volume.series or None) for volume in found]
        return case.model_copy(update={"series": named[0].series, "further": tuple(named[1:])}), found
    reads = [partial(_volume, case, number, source, data.accept) for number, source in enumerate(sources)]
    return case, ct.usable(reads, len(reads)) if data.together else [read() for read in reads]


def _volume(case: Case, number: int, source: Path, accept: tuple[str, ...]) -> ct.CTVolume:
    """One series of a case in HU; of several the Rejection says which it is."""
    each = case.every_series[number]
    place = each.volume
    try:
        read = partial(ct.read, source, series=each.series, rescale=each.rescale, accept=accept)
        return ct.admit(storage.retried(place, read), accept)
    except Rejection as rejection:
        if not case.further:
            raise
        which = f"series {number + 1} of {len(case.every_series)} ({storage.lasting(place)})"
        raise Rejection(rejection.uri, rejection.reason, f"{which}: {rejection.message}") from None

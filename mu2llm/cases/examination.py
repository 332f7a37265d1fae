"""The series of an examination: brought here, and read in HU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mu2llm import ct, storage
from mu2llm.errors import Rejection
from mu2llm.records import Case, Series


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


def volumes(
    series: Sequence[Series], sources: Sequence[str | Path], accept: tuple[str, ...], most: int | None
) -> list[ct.CTVolume]:
    """The series of an examination in HU, each read from its source; Rejection where one cannot be used.

    `most`: they are put together. One place without names of series gives those that are found there, at most so many,
    and of others than the first what cannot be used is passed over. None: each is meant as it is given.
    """
    if most is not None and unnamed(series):
        (one,) = series
        read = partial(ct.read_several, sources[0], most, rescale=one.rescale, accept=accept)
        return storage.retried(one.volume, read)
    reads = [partial(_volume, series, number, source, accept) for number, source in enumerate(sources)]
    return ct.usable(reads, len(reads)) if most is not None else [read() for read in reads]


def unnamed(series: Sequence[Series]) -> bool:
    """Whether the series are to be found: they are one place, and it is not said which is meant there."""
    return len(series) == 1 and series[0].series is None


def named(case: Case, found: Sequence[ct.CTVolume]) -> Case:
    """The case with the series that were found in its place."""
    first, *further = [Series(volume=case.volume, series=volume.series or None) for volume in found]
    return case.model_copy(update={"series": first.series, "further": tuple(further)})


def _volume(series: Sequence[Series], number: int, source: str | Path, accept: tuple[str, ...]) -> ct.CTVolume:
    """One of the series in HU; of several the Rejection says which it is."""
    each = series[number]
    try:
        read = partial(ct.read, source, series=each.series, rescale=each.rescale, accept=accept)
        return ct.admit(storage.retried(each.volume, read), accept)
    except Rejection as rejection:
        if len(series) == 1:
            raise
        which = f"series {number + 1} of {len(series)} ({storage.lasting(each.volume)})"
        raise Rejection(rejection.uri, rejection.reason, f"{which}: {rejection.message}") from None

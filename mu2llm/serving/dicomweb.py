"""Scans in an archive, by DICOMweb: which studies a client may name (QIDO-RS), and their images (WADO-RS)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mu2llm.errors import Rejection
from mu2llm.serving.problems import Problem

_PATH = re.compile(r"/studies/(?P<study>[0-9.]{1,64})(?:/series/(?P<series>[0-9.]{1,64}))?/?")
INSTANCES = "00201209"  # NumberOfSeriesRelatedInstances
SERIES = "0020000E"


def is_one(uri: str) -> bool:
    """Whether it is a URI of HTTP, which nothing but an archive is named by."""
    return uri.startswith(("http://", "https://"))


def allowed(uri: str, services: Sequence[str]) -> str:
    """The URI, if it is of a study or a series of one of the services; else a Problem that says no more."""
    for service in (each.rstrip("/") for each in services):
        if uri.startswith(f"{service}/") and _PATH.fullmatch(uri[len(service) :]):
            return uri
    raise Problem(403, "uri_not_allowed", "the study is in no archive that may be named (serving.dicomweb)")


def fetch(uri: str, most: int, series: int = 1) -> list[bytes]:
    """The DICOM files of the series that is named, or of so many CT series of the study, the largest first.

    Raises Rejection `not_found` and `too_large` (more than `most` images of one), OSError where the archive cannot be
    reached or refuses. Redirects are not followed: they may lead anywhere. A ~/.netrc of the reader's node has the
    passwords.
    """
    import requests
    from dicomweb_client import DICOMwebClient

    place, _, path = uri.partition("/studies/")
    named = _PATH.fullmatch(f"/studies/{path}")
    assert named is not None
    session = requests.Session()
    session.max_redirects = 0
    client = DICOMwebClient(place, session=session)
    client.set_http_retry_params(retry=False)
    try:
        study, wanted = named["study"], [named["series"]]
        if wanted == [None]:
            wanted = _largest(client.search_for_series(study, search_filters={"Modality": "CT"}))[:series]
        files = [file for each in wanted for file in _files(client.iter_series(study, each), uri, most)]
    except requests.HTTPError as error:
        if error.response is not None and error.response.status_code == 404:
            raise Rejection(uri, "not_found", "the archive has no such study") from None
        raise
    return files


def _files(images: Iterable[Any], uri: str, most: int) -> Iterator[bytes]:
    """The files of the images of one series."""
    for number, image in enumerate(images):
        if number == most:
            raise Rejection(uri, "too_large", f"more than {most} images")
        stream = io.BytesIO()
        image.save_as(stream, enforce_file_format=True)
        yield stream.getvalue()


def _largest(found: list[dict[str, Any]]) -> list[str]:
    """The UIDs of series, from the largest to the smallest; Rejection where there are none."""

    def size(series: dict[str, Any]) -> int:
        return int((series.get(INSTANCES, {}).get("Value") or [0])[0])

    if not found:
        raise Rejection("", "not_found", "the study has no CT series")
    return [str(series[SERIES]["Value"][0]) for series in sorted(found, key=size, reverse=True)]

"""Scans in an archive, by DICOMweb: which studies a client may name (QIDO-RS), and their images (WADO-RS)."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
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


def fetch(uri: str, most: int) -> list[bytes]:
    """The DICOM files of the series that is named, or of the largest CT series of the study.

    Raises Rejection `not_found` and `too_large` (more than `most` images), OSError where the archive cannot be reached
    or refuses. Redirects are not followed: they may lead anywhere. A ~/.netrc of the reader's node has the passwords.
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
        study, series = named["study"], named["series"]
        series = series or _largest(client.search_for_series(study, search_filters={"Modality": "CT"}))
        files: list[bytes] = []
        for image in client.iter_series(study, series):
            if len(files) == most:
                raise Rejection(uri, "too_large", f"more than {most} images")
            stream = io.BytesIO()
            image.save_as(stream, enforce_file_format=True)
            files.append(stream.getvalue())
    except requests.HTTPError as error:
        if error.response is not None and error.response.status_code == 404:
            raise Rejection(uri, "not_found", "the archive has no such study") from None
        raise
    return files


def _largest(found: list[dict[str, Any]]) -> str:
    def size(series: dict[str, Any]) -> int:
        return int((series.get(INSTANCES, {}).get("Value") or [0])[0])

    if not found:
        raise Rejection("", "not_found", "the study has no CT series")
    return str(max(found, key=size)[SERIES]["Value"][0])

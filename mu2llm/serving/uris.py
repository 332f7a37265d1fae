"""Which URIs a client may name: those below a configured one, and nothing else (no http, no climbing, no links out).

Names are taken as they are, as `mu2llm inspect` takes them: `%20` is no space.
"""

from __future__ import annotations

import binascii
import os
import re
from collections.abc import Sequence

from mu2llm.serving.problems import Problem

SCHEMES = ("s3", "gs", "file")
_DATA = re.compile(rb"data:[\w.+-]*/?[\w.+-]*(?:;[\w-]+=[\w.-]+)*;base64,")
_PIECE = 2**20  # of base64, decoded at a time; a multiple of 4
# %2e and %2f: whoever decodes a name later may not find a climbing one
_UNSAFE = re.compile(r"[\x00-\x1f\x7f?#\\]|%2[ef]|%5c|//|(?:^|/)\.\.?(?:/|$)", re.IGNORECASE)


def allowed(uri: str, below: Sequence[str]) -> str:
    """The URI, if it lies below one of `below`; else a Problem that does not say whether there is anything.

    An absolute path is the file:// URI of it.
    """
    uri = _whole(uri)
    scheme, separator, path = uri.partition("://")
    detail = (
        "the URI lies in no allowed place (serving.allowed_uris), or its name has //, .., ?, # or a backslash in it"
    )
    problem = Problem(403, "uri_not_allowed", detail)
    if not separator or scheme not in SCHEMES or _UNSAFE.search(path):
        raise problem
    places = [_whole(place).rstrip("/") for place in below]
    if not any(uri == place or uri.startswith(f"{place}/") for place in places):
        raise problem
    if scheme == "file":  # a link may lead out
        real = os.path.realpath(path)
        roots = [os.path.realpath(place.removeprefix("file://")) for place in places if place.startswith("file://")]
        if not any(real == root or real.startswith(f"{root}/") for root in roots):
            raise problem
    return uri


def _whole(uri: str) -> str:
    return f"file://{uri}" if uri.startswith("/") else uri


def data_url(url: str) -> bytes | None:
    """The bytes of a base64 data URL; None where it is another URL."""
    return decoded(memoryview(url.encode())) if url.startswith("data:") else None


def decoded(url: memoryview) -> bytes:
    """The bytes of a data URL, as it stands in JSON. Piece by piece, so that other threads go on meanwhile."""
    if b"\\" in bytes(url[:_PIECE]):  # some encoders write / as \/
        url = memoryview(bytes(url).replace(b"\\/", b"/"))
    head = _DATA.match(url[:256])
    if not head:
        raise Problem(422, "bad_data_url", "expected data:application/octet-stream;base64,…")
    text = url[head.end() :]
    pieces = (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
    try:
        return b"".join(binascii.a2b_base64(piece, strict_mode=True) for piece in pieces)
    except binascii.Error:
        raise Problem(422, "bad_data_url", "the data URL's base64 is damaged") from None

"""What a request holds: whose it is, how large, the scan and what is asked about it; read once it was let in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from mu2llm.serving.admission import Body
from mu2llm.serving.guard import BODY
from mu2llm.serving.problems import Problem
from mu2llm.serving.scans import URI, Scans
from mu2llm.serving.schemas import NamedScan, ReportOptions, ReportRequest
from mu2llm.serving.service import Upload

T = TypeVar("T")
MAX_FILES = 5000  # of one upload: the files of a DICOM series
MAX_FIELDS = 50
PRINCIPAL = "mu2llm.principal"  # in the scope: whose request it is
LISTS = {name for name, told in ReportOptions.model_json_schema()["properties"].items() if told.get("type") == "array"}


@contextlib.contextmanager
def counted(request: Request, holding: Callable[[int, str], contextlib.AbstractContextManager[Body]]) -> Iterator[Body]:
    """Lets the request in, or not, before its body is read; then what comes of it is counted."""
    with holding(length_of(request), principal_of(request)) as body:
        request.scope[BODY] = body
        yield body


def length_of(request: Request) -> int:
    """Of the body, as it is announced; of one in pieces (chunked) one byte, since that is not known."""
    return 1 if "transfer-encoding" in request.headers else int(request.headers.get("content-length", "0"))


def principal_of(request: Request) -> str:
    return str(request.scope[PRINCIPAL])


async def asked_of(request: Request, scans: Scans) -> tuple[Upload, ReportOptions]:
    """The scan and what is asked about it, from a form or from JSON."""
    if media(request) == "multipart/form-data":
        return await _from_form(request)
    asked = await json_of(
        request, ReportRequest.model_validate_json, "multipart/form-data with the field scan, or JSON"
    )
    options = ReportOptions(**asked.model_dump(exclude={"uri", "study", "scan"}))
    return await named(request, scans, uri_of(asked)), options


def uri_of(asked: NamedScan) -> str:
    return asked.uri or asked.study or f"{URI}{asked.scan}"


async def named(request: Request, scans: Scans, uri: str) -> Upload:
    """What lies at a URI, or the scan that was sent before, which counts as if it came now."""
    if not uri.startswith(URI):
        return Upload(uri=uri)
    stored = await asyncio.to_thread(scans.find, uri.removeprefix(URI), principal_of(request))
    request.scope[BODY].grow(stored.size)
    return Upload(files=await asyncio.to_thread(scans.read, stored))


def media(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def json_of(request: Request, parse: Callable[[bytearray], T], wanted: str = "JSON") -> T:
    """What `parse` makes of the body, beside the event loop: bodies may be large."""
    if media(request) != "application/json":
        raise Problem(415, "unsupported_media", f"send {wanted}, and say so by Content-Type")
    body = bytearray()
    async for piece in request.stream():
        body += piece
    try:
        return await asyncio.to_thread(parse, body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False)) from None


async def _from_form(request: Request) -> tuple[Upload, ReportOptions]:
    async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
        names = {name for name, _ in form.multi_items()} - {"scan"}
        fields: dict[str, Any] = {name: form[name] for name in names}
        fields |= {name: form.getlist(name) for name in names & LISTS}
        files = await _files(form)
    try:
        return Upload(files=files), ReportOptions.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False)) from None


async def files_of(request: Request) -> tuple[bytes, ...]:
    """Of a form with nothing but a scan."""
    if media(request) != "multipart/form-data":
        raise Problem(415, "unsupported_media", "send multipart/form-data with the field scan")
    async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
        if {name for name, _ in form.multi_items()} - {"scan"}:
            raise Problem(422, "invalid", "the form takes the field scan alone; what is asked names its id")
        return await _files(form)


async def _files(form: FormData) -> tuple[bytes, ...]:
    files = [value for value in form.getlist("scan") if isinstance(value, UploadFile)]
    if not files:
        raise Problem(422, "no_scan", "the form has no file in the field scan")
    return tuple([await file.read() for file in files])

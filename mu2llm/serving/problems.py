"""What a client is told when something is wrong: problem+json (RFC 9457) with a code and what to do.

No traceback, path or storage message leaves the service; nor does what a file says of its patient, which is why a
rejection is told by the documented sentence of its code alone.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from mu2llm.ct import ACCEPTABLE, REASONS
from mu2llm.errors import Failure, Rejection
from mu2llm.serving.faults import where

logger = logging.getLogger("ray.serve")
MEDIA = "application/problem+json"
TITLES = {
    400: "Bad request",
    401: "No valid API key",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    408: "Too slow",
    409: "Conflict",
    413: "Too large",
    415: "Unsupported format",
    422: "Cannot be processed",
    429: "Too many requests",
    500: "Internal error",
    503: "Not available",
}
_STATUS = {
    "not_found": 404,
    "too_large": 413,
    "unsupported_format": 415,
    "wrong_suffix": 415,
    **dict.fromkeys(("corrupt", "empty", "truncated", "unsafe_archive"), 400),
}
_SAFE_DETAILS = ("single_slice", "slice_gap", "not_3d", "not_hu", "bad_geometry")  # their messages are numbers only


class ProblemDetail(BaseModel):
    """An error: `code` is stable (for scans, a reason code of `mu2llm inspect`); `detail` says what to do.

    `acceptable`: the scan is let in where `accept` lists the code.
    """

    model_config = ConfigDict(extra="allow")
    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    acceptable: bool = False


class Problem(HTTPException):
    """Raised anywhere in a request; answered as problem+json."""

    def __init__(
        self, status: int, code: str, detail: str, retry_after: float | None = None, acceptable: bool = False
    ) -> None:
        super().__init__(status, detail)
        self.status, self.code, self.retry_after, self.acceptable = status, code, retry_after, acceptable

    def body(self) -> dict[str, Any]:
        told = ProblemDetail(
            title=TITLES[self.status],
            status=self.status,
            code=self.code,
            detail=self.detail,
            acceptable=self.acceptable,
        )
        # OpenAI's clients look for `error`
        error = {"message": self.detail, "type": TITLES[self.status], "code": self.code}
        return {**told.model_dump(), "error": error}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers, media_type=MEDIA)


def rejected(rejection: Rejection) -> Problem:
    """A scan that cannot be used, by its reason code."""
    detail = REASONS[rejection.reason]
    if rejection.reason in _SAFE_DETAILS:
        detail = f"{detail} ({rejection.message})"
    acceptable = rejection.reason in ACCEPTABLE
    if acceptable:
        detail += f"; send accept={rejection.reason} to let it in all the same"
    return Problem(_STATUS.get(rejection.reason, 422), rejection.reason, detail, acceptable=acceptable)


def internal() -> Problem:
    return Problem(500, "internal", "something broke here; the service's log says where")


def storage_failed() -> Problem:
    detail = "the service's storage cannot be reached or refuses; try again in a moment"
    return Problem(503, "storage", detail, 5)


def not_ready(why: str, retry_after: float = 2) -> Problem:
    return Problem(503, "not_ready", f"{why}; try again in a moment", retry_after)


def add_problem_handlers(app: FastAPI) -> None:
    """Whatever is raised becomes a problem's answer, with nothing of what was sent."""

    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        status = error.status_code if error.status_code in (400, 404, 405) else 400
        code = {404: "not_found", 405: "method_not_allowed"}.get(status, "bad_request")
        detail = {404: "there is nothing here; see /docs", 405: "this path has other methods; see /docs"}
        response = Problem(status, code, detail.get(status, "the request cannot be read; see /docs")).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return Problem(400, "bad_json", "the body is not JSON").response()
        if first["type"] == "extra_forbidden":  # its name is the client's
            return Problem(422, "invalid", "a field is not known here; see /docs").response()
        place = ".".join(str(part) for part in first["loc"])
        return Problem(422, "invalid", f"{place}: {first['msg']}; see /docs").response()

    @app.exception_handler(Failure)
    async def failed(_: Request, error: Failure) -> JSONResponse:
        logger.error("storage failed: %s", where(error))
        return storage_failed().response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return internal().response()  # `Guard` logs where

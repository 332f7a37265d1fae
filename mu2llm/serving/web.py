"""HTTP: the FastAPI application over a `Service`. Every path, model and status that OpenAPI tells of is here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp

import mu2llm
from mu2llm.serving import chat, formats, metrics, pages, samples, scans, streams
from mu2llm.serving.bodies import (
    PRINCIPAL,
    asked_of,
    counted,
    files_of,
    json_of,
    length_of,
    named,
    principal_of,
    uri_of,
)
from mu2llm.serving.guard import BODY, LOOPBACK, Guard, Uploads
from mu2llm.serving.jobs import Jobs
from mu2llm.serving.keys import Doorkeeper, Scope, principal
from mu2llm.serving.problems import MEDIA, ProblemDetail, add_problem_handlers
from mu2llm.serving.schemas import (
    CorrectionIn,
    CorrectionOut,
    DecisionIn,
    Draft,
    GreenAnswer,
    GreenRequest,
    Health,
    InfluenceAnswer,
    InfluenceIn,
    Job,
    ModelsAnswer,
    Readiness,
    Report,
    ReportOptions,
    ReportRequest,
    Sample,
    SentScan,
)
from mu2llm.serving.service import Service
from mu2llm.serving.streams import Stream

_BEARER = HTTPBearer(auto_error=False, scheme_name="API key", description="mu2llm key make")

_SCAN = {
    "type": "string",
    "format": "binary",
    "description": "NIfTI (.nii, .nii.gz), .mha, .nrrd or a zip of DICOM files; or repeated, the DICOM files",
}


def _field(told: dict[str, Any]) -> dict[str, Any]:
    """A property of JSON as a form's field: what may be null may be left out there."""
    kind, *null = told.get("anyOf", [told])
    return {**kind, "description": told.get("description", "")} if null else told


_OPTIONS = {name: _field(told) for name, told in ReportOptions.model_json_schema()["properties"].items()}
_FORM = {"type": "object", "required": ["scan"], "properties": {"scan": _SCAN, **_OPTIONS}}
_REF = "#/components/schemas/{model}"


def _body(model: type[BaseModel], **others: Any) -> dict[str, Any]:
    """A route's body in the description. FastAPI would read it before it asks for the key: the routes do it."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}, **others}
    return {"requestBody": {"required": True, "content": content}}


_SCAN_ALONE = {"type": "object", "required": ["scan"], "properties": {"scan": _SCAN}, "additionalProperties": False}
_SCAN_BODY = _body(ReportRequest, **{"multipart/form-data": {"schema": _FORM}})


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    schema = {"schema": {"$ref": "#/components/schemas/ProblemDetail"}}
    return {status: {"description": "Problem", "content": {MEDIA: schema}} for status in statuses}


_ALWAYS = (400, 401, 403, 408, 413, 415, 422, 429, 503)  # of routes that take a body
_REPORT_PROBLEMS = _problems(*_ALWAYS, 404, 406)


def application(service: Service, jobs: Jobs, doorkeeper: Doorkeeper, loopback: bool) -> ASGIApp:
    """Behind `Guard`, so that nothing reaches FastAPI that is too large or comes from a foreign page."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        jobs.start()
        yield
        await jobs.stop()
        await service.stop()

    app = FastAPI(
        title="mu2llm",
        version=mu2llm.__version__,
        description="Draft radiology reports of CT scans. Research use only; not a medical device.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.doorkeeper, app.state.settings = doorkeeper, service.settings
    app.include_router(_reports(service, jobs))
    app.include_router(_scans(service))
    app.include_router(_rest(service))
    app.include_router(_operations(service))
    pages.add(app)
    add_problem_handlers(app)
    _add_shared_schemas(app)
    settings = service.settings
    origins = settings.public_origins
    hosts = (*LOOPBACK, *settings.hosts, *(_host(origin) for origin in origins)) if loopback else None
    uploads = Uploads(settings.max_body_mb * 2**20, settings.upload_seconds, settings.upload_kb_per_second * 1000)
    return Guard(app, uploads, hosts, origins, service.metrics.answered)


def _host(origin: str) -> str:
    return urlsplit(origin).hostname or ""


def needs(scope: Scope) -> Any:
    """A route's dependency: an API key with the scope, where keys are on."""

    async def check(
        request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)] = None
    ) -> None:
        state = request.app.state
        key = await state.doorkeeper.check(given.credentials if given else None, scope)
        header = state.settings.subject_header
        subjects = request.headers.getlist(header) if header else []
        request.scope[PRINCIPAL] = principal(key, subjects, state.settings.trusted_proxies)

    return Depends(check)


# ---- reports


def _reports(service: Service, jobs: Jobs) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["reports"], dependencies=[needs("read")])

    @router.post(
        "/reports",
        response_model=Report,
        openapi_extra=_SCAN_BODY,
        responses={200: {"content": formats.OPENAPI | {formats.EVENTS: {}}}, **_REPORT_PROBLEMS},
    )
    async def make_report(request: Request) -> Response:
        """A draft report of a scan: as JSON, text, FHIR DiagnosticReport or DICOM SR by the Accept header."""
        kind = formats.choose(request.headers.get("accept", "*/*"))
        with contextlib.ExitStack() as held:
            body = held.enter_context(counted(request, service.admitted))
            upload, options = await asked_of(request, service.scans)
            body.arrived(upload.size)
            streamed = options.stream or kind == formats.EVENTS
            whose = not streamed and kind in (formats.DICOM, formats.FHIR)
            work = service.begin(
                *(upload, options),
                references=whose,
                dicom_only=whose and kind == formats.DICOM,
                principal=principal_of(request),
            )
            if streamed:
                async with streams.read(service, work) as reading:
                    return Stream(streams.events(streams.parts(service, work, reading)), held.pop_all())
            made = await service.report(work)
        return await asyncio.to_thread(formats.respond, kind, made)

    @router.post(
        "/jobs", status_code=202, response_model=Job, openapi_extra=_SCAN_BODY, responses=_problems(*_ALWAYS, 404)
    )
    async def make_job(request: Request, response: Response) -> Job:
        """The same in the background: for large scans and slow models. It survives a restart of the service."""
        async with jobs.admitted(length_of(request), principal_of(request)) as body:
            request.scope[BODY] = body
            upload, options = await asked_of(request, service.scans)
            body.arrived(upload.size)
            job = await jobs.add(upload, options, principal_of(request))
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return job

    @router.get("/jobs/{job_id}", responses=_problems(400, 401, 403, 404, 422, 503))
    async def get_job(job_id: str) -> Job:
        """Where a job stands, and its report when it is done."""
        return await jobs.get(job_id)

    @router.post(
        "/chat/completions",
        response_model=chat.ChatAnswer,
        openapi_extra=_body(chat.ChatRequest),
        responses=_REPORT_PROBLEMS,
    )
    async def chat_completions(request: Request) -> Response:
        """OpenAI-compatible: the scan as image_url (a data URL, scan:ID, or an s3 URL in an allowed place)."""
        with contextlib.ExitStack() as held:
            body = held.enter_context(counted(request, service.admitted))
            asked, upload = await json_of(request, chat.parse)
            upload = await named(request, service.scans, upload.uri) if upload.uri else upload
            body.arrived(upload.size)
            work = service.begin(upload, asked.options(), principal=principal_of(request))
            if asked.stream:
                model = service.status.model.get("id", "")
                async with streams.read(service, work) as reading:
                    told = chat.chunks(asked, work.id, model, streams.parts(service, work, reading))
                    return Stream(streams.chunks(told), held.pop_all())
            made = await service.report(work)
        return JSONResponse(chat.answer(made.report).model_dump(mode="json"))

    return router


def _scans(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/scans", tags=["reports"], dependencies=[needs("read")])
    form = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _SCAN_ALONE}}}}

    @router.post("", status_code=201, openapi_extra=form, responses=_problems(*_ALWAYS))
    async def keep_scan(request: Request, response: Response) -> SentScan:
        """Keeps a scan for `serving.scan_minutes`, unread: reports, jobs and chat name it, who sent it alone."""
        with counted(request, service.bodies.holding) as body:
            await asyncio.to_thread(service.scans.check_room)
            files = await files_of(request)
            body.arrived(sum(len(data) for data in files))
            kept = await asyncio.to_thread(service.scans.add, list(files), principal_of(request))
        response.headers["Location"] = f"/v1/scans/{kept.id}"
        return SentScan(id=kept.id, size=kept.size, expires=kept.expires.isoformat(timespec="seconds"))

    @router.get(
        "/{scan_id}",
        response_class=Response,
        responses={200: {"content": {"application/octet-stream": {}}}, **_problems(400, 401, 403, 404, 422, 429, 503)},
    )
    async def get_scan(scan_id: str, request: Request) -> Response:
        """The scan as it was sent, for who sent it alone: the file, or a zip of several."""
        with counted(request, service.bodies.holding):
            sent = await named(request, service.scans, f"{scans.URI}{scan_id}")
            packed = await asyncio.to_thread(scans.packed, sent.files)
        return Response(packed, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    @router.delete("/{scan_id}", status_code=204, responses=_problems(400, 401, 403, 404, 422, 503))
    async def delete_scan(scan_id: str, request: Request) -> None:
        """Deletes it before its time."""
        await asyncio.to_thread(service.scans.delete, scan_id, principal_of(request))

    return router


# ---- the rest of version 1


def _rest(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post(
        "/green",
        tags=["green"],
        dependencies=[needs("score")],
        openapi_extra=_body(GreenRequest),
        responses=_problems(*_ALWAYS),
    )
    async def green(request: Request) -> GreenAnswer:
        """GREEN of candidate reports against references."""
        with counted(request, service.texts.holding):
            asked = await json_of(request, GreenRequest.model_validate_json)
        return await service.green(asked.pairs)

    @router.post(
        "/corrections",
        tags=["corrections"],
        status_code=201,
        dependencies=[needs("correct")],
        openapi_extra=_body(CorrectionIn),
        responses=_problems(*_ALWAYS, 404, 409),
    )
    async def correct(request: Request) -> CorrectionOut:
        """A radiologist's version of a generated report: kept as a preference pair for `mu2llm prefer`."""
        with counted(request, service.texts.holding):
            given = await json_of(request, CorrectionIn.model_validate_json)
        return await service.drafts.correct(given, service.status.question, principal_of(request))

    @router.post(
        "/decisions",
        tags=["corrections"],
        dependencies=[needs("correct")],
        openapi_extra=_body(DecisionIn),
        responses=_problems(*_ALWAYS, 404, 409),
    )
    async def decide(request: Request) -> Draft:
        """Accepts or rejects a draft, as it was generated or last corrected; what is decided stays so."""
        with counted(request, service.texts.holding):
            given = await json_of(request, DecisionIn.model_validate_json)
        return await service.drafts.decide(given, principal_of(request))

    @router.get(
        "/drafts/{report_id}",
        tags=["corrections"],
        dependencies=[needs("read")],
        responses=_problems(400, 401, 403, 404, 422, 503),
    )
    async def draft(report_id: str) -> Draft:
        """A report by its id, and what became of it."""
        return await service.drafts.get(report_id)

    @router.post(
        "/drafts/{report_id}/influence",
        tags=["reports"],
        dependencies=[needs("read")],
        openapi_extra=_body(InfluenceIn),
        responses=_problems(*_ALWAYS, 404, 409),
    )
    async def influence(report_id: str, request: Request) -> InfluenceAnswer:
        """What each sentence of a draft depended on in its scan, which is named again."""
        with counted(request, service.admitted) as body:
            asked = await json_of(request, InfluenceIn.model_validate_json)
            stored = await asyncio.to_thread(service.store.report, report_id)
            upload = await named(request, service.scans, uri_of(asked))
            body.arrived(upload.size)
            work = service.begin(upload, ReportOptions(accept=asked.accept), principal=principal_of(request))
            return await service.influence(work, stored)

    @router.delete(
        "/drafts/{report_id}",
        tags=["corrections"],
        status_code=204,
        dependencies=[needs("correct")],
        responses=_problems(400, 401, 403, 404, 422, 503),
    )
    async def delete_draft(report_id: str, request: Request) -> None:
        """Deletes a report with its corrections and the input that was kept of its scan: consent is withdrawn."""
        await service.drafts.delete(report_id, principal_of(request))

    @router.get("/models", tags=["models"], dependencies=[needs("read")], responses=_problems(400, 401, 403, 503))
    async def models() -> ModelsAnswer:
        """The checkpoint that writes now and those of a roll-out, in OpenAI's form; `role` says which is which."""
        return ModelsAnswer(data=service.models())

    @router.get("/samples", tags=["samples"], dependencies=[needs("read")], responses=_problems(400, 401, 403, 503))
    def sample_list() -> list[Sample]:
        """Scans to try: procedural phantoms."""
        return samples.samples()

    @router.get(
        "/samples/{sample_id}",
        tags=["samples"],
        dependencies=[needs("read")],
        response_class=Response,
        responses={200: {"content": {"application/gzip": {}}}, **_problems(400, 401, 403, 404, 422, 503)},
    )
    def sample(sample_id: str) -> Response:
        """One of them, as .nii.gz."""
        made = samples.make(sample_id)
        headers = {"Content-Disposition": f'attachment; filename="{sample_id}.nii.gz"'}
        return Response(made.nifti(), media_type="application/gzip", headers=headers)

    return router


def _operations(service: Service) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def health() -> Health:
        """200 as long as the process answers."""
        return Health()

    @router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
    async def ready() -> JSONResponse:
        """200 when reports can be written: weights loaded, a first report made."""
        status = service.status
        told = Readiness(
            ready=status.ready,
            why=status.why,
            model=status.model or None,  # type: ignore[arg-type]
            warm_up_seconds=status.warm_up_seconds,
        )
        return JSONResponse(told.model_dump(mode="json"), 200 if status.ready else 503)

    @router.get(
        "/metrics",
        dependencies=[needs("read")],
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **_problems(400, 401, 403, 503)},
    )
    async def prometheus() -> Response:
        """For Prometheus: the numbers of all replicas, some ten seconds old at most."""
        return Response(await asyncio.to_thread(metrics.exported), media_type=metrics.MEDIA)

    return router


# ---- schemas


def _add_shared_schemas(app: FastAPI) -> None:
    """Models that only hand-written parts of the description name."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        models = (ProblemDetail, ReportRequest, chat.ChatRequest, GreenRequest, CorrectionIn, DecisionIn, InfluenceIn)
        _, made = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
        schema["components"]["schemas"] |= made["$defs"]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]

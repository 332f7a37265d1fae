"""What a browser gets: the reading room where it is built, else a plain page; /docs from a local copy of Swagger UI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from swagger_ui_bundle import swagger_ui_path

VIEWER = Path(__file__).parent / "viewer" / "dist"
_DOCS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mu2llm API</title>
<link rel="stylesheet" href="docs/assets/swagger-ui.css"></head>
<body><div id="swagger-ui"></div><script src="docs/assets/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script></body></html>"""
_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true});'
_PLAIN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mu2llm</title>
<style>body{font:16px/1.5 sans-serif;max-width:44em;margin:3em auto;padding:0 1em;background:#111;color:#ddd}
a{color:#8bf}code{background:#222;padding:.1em .3em}</style></head>
<body><h1>mu2llm</h1>
<p>Post a CT scan (NIfTI, .mha, .nrrd, or a zip of DICOM files); the answer is a draft of its report as JSON.
Research use only; not a medical device.</p>
<p><code>curl -H "Authorization: Bearer KEY" -F scan=@scan.nii.gz ADDRESS/v1/reports</code></p>
<p>KEY is an API key, or the token in the address that <code>mu2llm serve</code> printed.</p>
<p>The reading room is not built here: <code>make viewer</code> builds it (it needs npm), then start the service again.
The API is described at <a href="docs">/docs</a>.</p></body></html>"""


class Viewer(StaticFiles):
    """The page is asked for anew each time; what it loads has a hash in its name and never changes."""

    def file_response(self, full_path: str | os.PathLike[str], *arguments: Any, **more: Any) -> Response:
        response = super().file_response(full_path, *arguments, **more)
        hashed = Path(full_path).parent.name == "assets"
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if hashed else "no-cache"
        return response


def add(app: FastAPI) -> None:
    """Last of all routes: what is mounted at / takes every path that is left."""

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(_DOCS)

    @app.get("/docs/start.js", include_in_schema=False)
    def start() -> Response:
        return Response(_START, media_type="text/javascript")

    app.mount("/docs/assets", StaticFiles(directory=swagger_ui_path), name="swagger")
    if (VIEWER / "index.html").is_file():
        app.mount("/", Viewer(directory=VIEWER, html=True), name="viewer")
        return

    @app.get("/", include_in_schema=False)
    def plain() -> HTMLResponse:
        return HTMLResponse(_PLAIN)

"""The pages at ``/`` and ``/docs`` of every service, with assets from a package, not from the internet."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response

from queue_schemas import PathNotFound

from .access import Access, allow

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
_START = """window.ui = SwaggerUIBundle({
  url: new URL("openapi.json", document.baseURI).href, dom_id: "#docs", deepLinking: true, persistAuthorization: false,
  presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout", validatorUrl: null
});
"""
_HEADERS = {
    # Swagger UI sets styles by script; everything else is this service's own.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_CACHED = _HEADERS | {"cache-control": "public, max-age=3600"}


def add_browser_pages(app: FastAPI) -> None:
    """Give ``app`` its pages for people. It must have been made with ``docs_url=None`` and ``redoc_url=None``."""
    title, summary = escape(app.title), escape(app.summary or app.description.partition("\n")[0])

    @app.get("/", include_in_schema=False, dependencies=[allow(Access.PUBLIC)])
    async def root(request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            found = {"name": app.title, "version": app.version, "docs": "docs", "openapi": "openapi.json"}
            return JSONResponse(found, headers=_HEADERS)
        return HTMLResponse(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            '<link rel="icon" href="docs/assets/favicon.png">'
            f"<h1>{title}</h1><p>{summary}</p><ul>"
            '<li><a href="docs">API documentation</a> (<a href="openapi.json">OpenAPI document</a>)'
            '<li><a href="readyz">Is it ready?</a><li><a href="metrics">Prometheus metrics</a></ul></html>',
            headers=_HEADERS,
        )

    @app.get("/docs", include_in_schema=False, dependencies=[allow(Access.PUBLIC)])
    async def docs() -> Response:
        return HTMLResponse(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            '<link rel="icon" href="docs/assets/favicon.png"><link rel="stylesheet" href="docs/assets/swagger-ui.css">'
            '<div id="docs"><noscript>This page needs JavaScript; the document is at '
            '<a href="openapi.json">openapi.json</a>.</noscript></div>'
            '<script src="docs/assets/swagger-ui-bundle.js"></script>'
            '<script src="docs/assets/start.js"></script></html>',
            headers=_HEADERS,
        )

    @app.get("/docs/assets/{name}", include_in_schema=False, dependencies=[allow(Access.PUBLIC)])
    async def asset(name: str) -> Response:
        if name == "start.js":
            return Response(_START, media_type="text/javascript", headers=_CACHED)
        if name not in _ASSETS:
            raise PathNotFound(f"there is no asset {name[:80]!r}")
        path = Path(str(files("fastapi_offline").joinpath("static", name)))
        return FileResponse(path, media_type=_ASSETS[name], headers=_CACHED)

"""``/v1/files``: uploads, lists, shows, downloads and deletes files."""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from openai_api.pages import Page, page_of
from storage import FileRecord
from telemetry.http.access import Access
from telemetry.http.error_answers import error_responses

from ..http.access import Gate
from ..http.bodies import ClientGone
from ..idempotency import read_request_key
from ..store import AsyncStore
from .downloads import Download, Downloads
from .quota import StorageQuota
from .schemas import UPLOAD_FORM, FileDeleted, FileObject, file_object
from .service import FileService
from .uploads import Uploads

FILES_PATH = "/v1/files"
_ONE = FILES_PATH + "/{file_id}"
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {Download.media_type: {"schema": {"type": "string", "format": "binary"}}}},
    206: {"description": "A range of it"},
    304: {"description": "The caller has it"},
}
_CLIENT_CLOSED_REQUEST = 499
"""The status that metrics count for an upload whose client left; nobody reads it."""


def file_routes(
    files: FileService, store: AsyncStore, uploads: Uploads, downloads: Downloads, quota: StorageQuota, gate: Gate
) -> APIRouter:
    """The routes of one Router. ``store`` runs what ``files`` does, which blocks."""
    routes = APIRouter(tags=["files"], dependencies=[gate.allow(Access.CLIENT)])

    async def find(request: Request, file_id: str) -> FileRecord:
        tenant, now_s = gate.tenant_of(request), time.time()
        return await store.run(lambda: files.get(tenant, file_id, now_s), tenant=tenant)

    @routes.post(
        FILES_PATH,
        summary="Upload a file",
        response_model=FileObject,
        responses=error_responses(400, 401, 403, 408, 413, 422, 429, 503, 507),
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD_FORM}}}},
    )
    async def upload(request: Request) -> Response:
        tenant, key = gate.tenant_of(request), read_request_key(request)
        try:
            record = await uploads.upload(tenant, request.receive, request.headers, key)
        except ClientGone:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return JSONResponse(file_object(record).model_dump())

    @routes.get(
        FILES_PATH,
        summary="Your files",
        response_model=Page[FileObject],
        responses=error_responses(400, 401, 429, 503),
    )
    async def page(
        request: Request,
        after: str = Query("", max_length=64),
        limit: int = Query(10_000, ge=1, le=10_000),
        order: Literal["asc", "desc"] = "desc",
        purpose: str = Query("", max_length=64),
    ) -> JSONResponse:
        tenant, now_s = gate.tenant_of(request), time.time()
        found, more = await store.read_page(
            tenant, lambda: files.page(tenant, now_s, after=after, limit=limit, order=order, purpose=purpose)
        )
        return JSONResponse(page_of([file_object(record).model_dump() for record in found], has_more=more))

    @routes.get(_ONE, summary="One of them", responses=error_responses(401, 404, 429, 503))
    async def one(file_id: str, request: Request) -> FileObject:
        return file_object(await find(request, file_id))

    @routes.delete(_ONE, summary="Delete one", responses=error_responses(401, 404, 409, 429, 503))
    async def delete(file_id: str, request: Request) -> FileDeleted:
        tenant, now_s = gate.tenant_of(request), time.time()
        await store.run(lambda: files.delete(tenant, file_id, now_s), tenant=tenant)
        quota.invalidate(tenant)
        return FileDeleted(id=file_id)

    @routes.get(
        _ONE + "/content",
        summary="What it holds, or a range of it",
        response_class=Response,
        responses=_CONTENT | error_responses(401, 404, 416, 429, 503),
    )
    async def content(file_id: str, request: Request) -> Response:
        return await downloads.response(request, await find(request, file_id))

    @routes.head(_ONE + "/content", include_in_schema=False)
    async def content_head(file_id: str, request: Request) -> Response:
        return await downloads.response(request, await find(request, file_id))

    return routes

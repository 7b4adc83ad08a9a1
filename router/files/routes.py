"""``/v1/files``: taking files in, and listing, showing, giving out and removing them."""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from queue_schemas import BadRequest, Conflict, NotFound, RangeNotSatisfiable
from storage import Batches, FileRecord, Files, ObjectMissing
from storage.names import FILE, is_id
from telemetry import get_logger
from telemetry.http.access import Access
from telemetry.http.asgi import error_response, error_responses

from ..http.bodies import ClientGone
from ..idempotency import read_sent
from ..state import RouterState
from .content import disposition, matches, read_range
from .downloads import Download
from .form import PURPOSES
from .uploads import Uploads

FILES_PATH = "/v1/files"
_ONE = FILES_PATH + "/{file_id}"
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3_600, "maximum": 2_592_000},
    },
}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {Download.media_type: {"schema": {"type": "string", "format": "binary"}}}},
    206: {"description": "A range of it"},
    304: {"description": "The caller has it"},
}
_CLIENT_GONE = 499
"""What the figures say of an upload whose client left; nobody reads it."""

log = get_logger(__name__)


class FileObject(BaseModel):
    """A file, as the vendor's API has it. Times are Unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_routes(state: RouterState) -> APIRouter:
    """The paths below ``/v1/files``."""
    routes = APIRouter(tags=["files"], dependencies=[state.gate.allow(Access.CLIENT)])
    uploads, store, files = Uploads(state), state.store, state.store.files

    @routes.post(
        FILES_PATH,
        summary="Upload a file",
        response_model=FileObject,
        responses=error_responses(400, 401, 403, 408, 413, 422, 429, 503, 507),
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
    )
    async def upload(request: Request) -> Response:
        try:
            record = await uploads.take(
                state.keys.caller(request), request.receive, request.headers, read_sent(request)
            )
        except ClientGone:
            return Response(status_code=_CLIENT_GONE)
        return JSONResponse(_shown(record).model_dump())

    @routes.get(FILES_PATH, summary="Your files", responses=error_responses(400, 401, 429, 503))
    async def page(
        request: Request,
        after: str = Query("", max_length=64),
        limit: int = Query(10_000, ge=1, le=10_000),
        order: Literal["asc", "desc"] = "desc",
        purpose: str = Query("", max_length=64),
    ) -> FileList:
        tenant, now_s = state.keys.caller(request), time.time()
        if after and not is_id(after, FILE):
            raise BadRequest("after must be the id of a file: the last_id of the page before", param="after")
        found, more = await store.read_page(
            tenant, lambda: files.page(tenant, now_s, after=after, limit=limit, order=order, purpose=purpose)
        )
        ids = [record.id for record in found]
        return FileList(
            data=[_shown(record) for record in found],
            first_id=ids[0] if ids else None,
            last_id=ids[-1] if ids else None,
            has_more=more,
        )

    @routes.get(_ONE, summary="One of them", responses=error_responses(401, 404, 429, 503))
    async def one(file_id: str, request: Request) -> FileObject:
        return _shown(await _found(state, request, file_id))

    @routes.delete(_ONE, summary="Remove one", responses=error_responses(401, 404, 409, 429, 503))
    async def remove(file_id: str, request: Request) -> FileDeleted:
        tenant, record = state.keys.caller(request), await _found(state, request, file_id)
        await store.run(lambda: _remove(files, store.batches, record), tenant=tenant)
        state.allowance.forget(tenant)
        log.info("file_deleted", file_id=file_id, tenant=tenant)
        return FileDeleted(id=record.id)

    @routes.get(
        _ONE + "/content",
        summary="What it holds, or a range of it",
        response_class=Response,
        responses=_CONTENT | error_responses(401, 404, 416, 429, 503),
    )
    async def content(file_id: str, request: Request) -> Response:
        return await _content(state, request, await _found(state, request, file_id))

    @routes.head(_ONE + "/content", include_in_schema=False)
    async def content_head(file_id: str, request: Request) -> Response:
        return await _content(state, request, await _found(state, request, file_id))

    return routes


async def _content(state: RouterState, request: Request, record: FileRecord) -> Response:
    etag = f'"{record.id}"'  # what an id names never changes
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "content-disposition": disposition(record.filename),
        "x-content-type-options": "nosniff",
    }
    if matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    asked = request.headers.get("range")
    if request.headers.get("if-range", etag) != etag:
        asked = None
    try:
        span = read_range(asked, record.bytes)
    except RangeNotSatisfiable as error:
        refusal = error_response(error)
        refusal.headers["content-range"] = f"bytes */{record.bytes}"
        return refusal
    if span is not None:
        headers["content-range"] = f"bytes {span[0]}-{span[1] - 1}/{record.bytes}"
    start, end = span or (0, record.bytes)
    if request.method == "HEAD":
        length = {"content-length": str(end - start)}
        return Response(status_code=206 if span else 200, headers=headers | length, media_type=Download.media_type)
    store = state.store
    try:
        first = await store.run(lambda: store.files.piece(record, start, end))
    except ObjectMissing as error:
        log.error("content_missing", file_id=record.id, object=str(error))
        raise NotFound(f"the content of {record.id} is not there any more: upload it again", param="file_id") from error
    return Download(state, record, span, first, headers)


def _remove(files: Files, batches: Batches, record: FileRecord) -> None:
    """Raises ``Conflict`` if a batch is still to read it."""
    for tenant, batch_id in batches.live():
        if tenant != record.tenant:
            continue
        asked = batches.asked(tenant, batch_id)
        if asked is None or asked.input_file_id != record.id:
            continue
        batch = batches.get(tenant, batch_id)
        if batch is not None and not batch.ended:
            raise Conflict(f"{batch_id} still reads it: wait for the batch to end, or cancel it first", param="file_id")
    files.delete(record)


async def _found(state: RouterState, request: Request, file_id: str) -> FileRecord:
    tenant, now_s = state.keys.caller(request), time.time()
    record = await state.store.run(lambda: state.store.files.get(tenant, file_id, now_s), tenant=tenant)
    if record is None:
        raise NotFound(f"there is no file {file_id[:80]!r} of yours", param="file_id")
    return record


def _shown(record: FileRecord) -> FileObject:
    return FileObject(
        id=record.id,
        bytes=record.bytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
    )

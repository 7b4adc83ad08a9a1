"""Sends a file's content to the client, reading it from the store no faster than the client takes it.

A client that stops reading is dropped by its connection (:mod:`telemetry.http.connections`)."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from queue_schemas import NotFound, RangeNotSatisfiable, Tenant
from storage import FileRecord
from telemetry.http.error_answers import error_response

from ..metrics import RouterMetrics
from ..store import AsyncStore
from .rules import content_disposition, etag_matches, read_range
from .service import FileService
from .transfers import Transfers


class Downloads:
    """Answers requests for the content of files."""

    def __init__(self, store: AsyncStore, files: FileService, transfers: Transfers, metrics: RouterMetrics) -> None:
        self.store = store
        self.files = files
        self.transfers = transfers
        self.metrics = metrics

    async def response(self, request: Request, record: FileRecord) -> Response:
        """The content, the range of it that the request asks for, only the headers, or 304."""
        etag = f'"{record.id}"'  # what an id names never changes
        headers = {
            "accept-ranges": "bytes",
            "etag": etag,
            "content-disposition": content_disposition(record.filename),
            "x-content-type-options": "nosniff",
        }
        if etag_matches(request.headers.get("if-none-match"), etag):
            return Response(status_code=304, headers=headers)
        same = request.headers.get("if-range", etag) == etag
        try:
            span = read_range(request.headers.get("range") if same else None, record.bytes)
        except RangeNotSatisfiable as error:
            refusal = error_response(error)
            refusal.headers["content-range"] = f"bytes */{record.bytes}"
            return refusal
        if span is not None:
            headers["content-range"] = f"bytes {span[0]}-{span[1] - 1}/{record.bytes}"
        start, end = span or (0, record.bytes)
        status = 206 if span else 200
        headers["content-length"] = str(end - start)
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers, media_type=Download.media_type)
        first = await self.store.run(lambda: self.files.read(record, start, end))
        return Download(self, record, (start, end), first, status, headers)


class Download(Response):
    """The bytes of ``record`` within ``span`` (the first, and the one behind the last).

    ``first`` holds those that have been read already, so that a file that cannot be read at all is an error instead of
    half a response.
    """

    media_type = "application/octet-stream"

    def __init__(
        self,
        downloads: Downloads,
        record: FileRecord,
        span: tuple[int, int],
        first: bytes,
        status: int,
        headers: dict[str, str],
    ) -> None:
        super().__init__(b"", status, headers)
        self._downloads = downloads
        self._record = record
        self._at, self._end = span
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._downloads.transfers.one(Tenant(self._record.tenant)):
            gone = asyncio.create_task(_until_gone(receive))
            try:
                await self._send_all(send, gone)
            finally:
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)

    async def _send_all(self, send: Send, gone: asyncio.Task[None]) -> None:
        start: Message = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        piece, more = self._first, True
        while more and not gone.done():
            self._at += len(piece)
            more = self._at < self._end
            if start:
                await send(start)
                start = {}
            await send({"type": "http.response.body", "body": piece, "more_body": more})
            self._downloads.metrics.file_bytes("out", len(piece))
            if more:
                piece = await self._next()

    async def _next(self) -> bytes:
        files = self._downloads.files
        try:
            return await self._downloads.store.run(lambda: files.read(self._record, self._at, self._end))
        except NotFound as error:
            # The response has begun: only ending it before its length tells the client.
            raise RuntimeError(f"the file was removed while it was read: {error.message}") from error


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

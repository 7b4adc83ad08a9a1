"""A file's content on its way to the client, read no faster than the client reads.

A client that stops reading is dropped by its connection (:mod:`telemetry.http.connections`)."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from queue_schemas import Tenant
from storage import FileRecord, ObjectMissing

from ..state import RouterState


class Download(Response):
    """Bytes of ``record``: those of ``span`` (the first, and the one behind the last), or all.

    ``first`` is what was read of them already: what cannot be read at all is an error, not half an answer.
    """

    media_type = "application/octet-stream"

    def __init__(
        self,
        state: RouterState,
        record: FileRecord,
        span: tuple[int, int] | None,
        first: bytes,
        headers: dict[str, str],
    ) -> None:
        start, end = span or (0, record.bytes)
        super().__init__(b"", 206 if span else 200, headers | {"content-length": str(end - start)})
        self._state = state
        self._record = record
        self._at, self._end = start, end
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._state.transfers.one(Tenant(self._record.tenant)):
            gone = asyncio.create_task(_until_gone(receive))
            try:
                await self._send_all(send, gone)
            finally:
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)

    async def _send_all(self, send: Send, gone: asyncio.Task[None]) -> None:
        head: Message = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        piece, more = self._first, True
        while more and not gone.done():
            self._at += len(piece)
            more = self._at < self._end
            if head:
                await send(head)
                head = {}
            await send({"type": "http.response.body", "body": piece, "more_body": more})
            self._state.metrics.file_bytes("out", len(piece))
            if more:
                piece = await self._next()

    async def _next(self) -> bytes:
        try:
            return await self._state.store.run(lambda: self._state.store.files.piece(self._record, self._at, self._end))
        except ObjectMissing as error:
            # The answer has begun: only its end before its length tells the client.
            raise RuntimeError(f"the file was removed while it was read: {error}") from error


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

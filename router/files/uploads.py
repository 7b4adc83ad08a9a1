"""Taking a file in: from the socket through the form into the store, no faster than the store writes.

What is held of a file is one piece, however large it is and however slowly it comes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TypeVar

from starlette.types import Message, Receive

from queue_schemas import BadRequest, Tenant
from storage import FileRecord, Upload, new_file_id
from telemetry import get_logger

from ..http.bodies import ClientGone
from ..http.forms import boundary_of
from ..http.rules import announced_size, check_size
from ..idempotency import Idempotency, Sent
from ..state import RouterState
from .form import BATCH_PURPOSE, FORM_BYTES, FileForm, FileParams

PIECE_BYTES = 512 * 1024
"""How much of a body is gathered before a thread takes it to the store."""
_Answer = TypeVar("_Answer")

log = get_logger(__name__)


class Uploads:
    """Takes the files of one Router in."""

    def __init__(self, state: RouterState) -> None:
        self._state = state
        self._settings = state.settings

    async def take(self, tenant: Tenant, receive: Receive, headers: Mapping[str, str], sent: Sent) -> FileRecord:
        """The file that the request brings, once the store has it.

        Raises ``ClientGone`` if the client goes before it is complete, else what the client is to be told. Then nothing
        of it stays in the store.
        """
        state, max_bytes = self._state, self._settings.max_file_bytes
        state.lifecycle.ensure_accepting()
        content_type = headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
            raise BadRequest("send the file as multipart/form-data with the fields file and purpose")
        boundary = boundary_of(content_type)
        length = headers.get("content-length")
        announced = announced_size(None if length is None else length.encode("latin-1"))
        check_size(announced, max_bytes + FORM_BYTES)
        with state.transfers.one(tenant):
            claim = await state.allowance.claim(tenant, max(0, announced - FORM_BYTES))
            incoming = _Incoming(state, tenant, FileForm(boundary), sent)
            record = None
            try:
                size = 0
                async for piece in self._pieces(receive):
                    size += len(piece)
                    check_size(size, max_bytes + FORM_BYTES)
                    claim.grow(size - FORM_BYTES)
                    await incoming.take(piece)
                    state.metrics.file_bytes("in", len(piece))
                claim.grow(incoming.size)
                record = await incoming.finish(self._settings.batch_file_life_s)
                if not incoming.made:
                    incoming.abandon()
            except BaseException:
                incoming.abandon()
                raise
            finally:
                claim.end(record.bytes if record is not None and incoming.made else None)
        log.info("file_uploaded", file_id=record.id, tenant=tenant, bytes=record.bytes, purpose=record.purpose)
        return record

    async def _pieces(self, receive: Receive) -> AsyncIterator[bytes]:
        """The body in pieces of a size that is worth a thread's while."""
        gathered = bytearray()
        more = True
        while more:
            message = await self._message(receive)
            gathered += message.get("body", b"")
            more = message.get("more_body", False)
            if gathered and (len(gathered) >= PIECE_BYTES or not more):
                yield bytes(gathered)
                gathered.clear()

    async def _message(self, receive: Receive) -> Message:
        message = await receive()  # which the connection ends that is silent or slow
        if message["type"] != "http.request":
            raise ClientGone
        return message


class _Incoming:
    """One file on its way into the store. Its blocking steps are done in threads, one after the other."""

    def __init__(self, state: RouterState, tenant: Tenant, form: FileForm, sent: Sent) -> None:
        self._idempotency = Idempotency(state.store.requests, state.settings.keep_answers_ms)
        self._sent = sent
        self._store = state.store
        self._max_bytes = state.settings.max_file_bytes
        self._tenant = tenant
        self._form = form
        self._id = new_file_id(time.time_ns() // 1_000_000)
        self._upload: Upload | None = None
        self._record: FileRecord | None = None
        self._under_way = False
        self._discarding = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of the file so far."""
        return self._upload.size if self._upload is not None else 0

    async def take(self, data: bytes) -> None:
        """The next bytes of the form."""
        await self._do(lambda: self._take(data))

    @property
    def made(self) -> bool:
        """Whether it has become a file, and not the file of an earlier try of the same request."""
        return self._record is not None

    async def finish(self, batch_life_s: int) -> FileRecord:
        """The form is complete: make it a file, or find the one that an earlier try under the same key left.

        Raises ``IdempotencyKeyReused`` for a key that was sent with another file.
        """
        return await self._do(lambda: self._finish(batch_life_s))

    def abandon(self) -> None:
        """Remove what there is of it; at once, or when the step that is under way has ended."""
        if not self._under_way:
            self._store.later(self._discard)

    async def _do(self, step: Callable[[], _Answer]) -> _Answer:
        def guarded() -> _Answer:
            try:
                return step()
            finally:
                self._under_way = False

        self._under_way = True
        return await self._store.run(guarded, undo=self._discard)

    def _take(self, data: bytes) -> None:
        for piece in self._form.feed(data):
            self._opened().write(piece)

    def _finish(self, batch_life_s: int) -> FileRecord:
        asked = self._form.finish()
        upload, now = self._opened(), int(time.time())
        lives_s = asked.lives_s or (batch_life_s if asked.purpose == BATCH_PURPOSE else 0)
        earlier = self._earlier(asked, upload, now) if self._sent.key else None
        if earlier is not None:
            return earlier
        upload.commit()
        self._record = FileRecord(
            id=self._id,
            tenant=self._tenant,
            filename=asked.filename,
            purpose=asked.purpose,
            created_at=now,
            bytes=upload.size,
            expires_at=now + lives_s if lives_s else None,
            sha256=upload.sha256,
            parts=upload.parts,
        )
        self._store.files.add(self._record)
        return self._record

    def _earlier(self, asked: FileParams, upload: Upload, now: int) -> FileRecord | None:
        """The file of an earlier try; None if there is none, or not any more."""
        what = [asked, upload.size, upload.sha256]
        claim = self._idempotency.claim(self._tenant, self._sent, "upload file", what, self._id, now * 1000)
        found = None if claim.first else self._store.files.get(self._tenant, claim.record.result, now)
        if found is None and not claim.first:
            self._idempotency.renew(claim, self._id)
        return found

    def _opened(self) -> Upload:
        if self._upload is None:
            self._upload = self._store.files.begin(self._tenant, self._id, self._max_bytes)
        return self._upload

    def _discard(self) -> None:
        with self._discarding:
            try:
                if self._record is not None:
                    self._store.files.delete(self._record)
            finally:
                if self._upload is not None:
                    self._upload.discard()

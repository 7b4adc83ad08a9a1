"""Uploads: from the socket through the form into the store, no faster than the store writes.

Memory holds one piece of a file, however large the file is and however slowly it arrives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TypeVar

from starlette.types import Receive

from queue_schemas import BadRequest, Tenant
from storage import FileRecord, Upload, new_file_id
from telemetry import get_logger

from ..http.bodies import ClientGone
from ..http.forms import boundary_of
from ..http.rules import announced_size, check_size
from ..idempotency import Idempotency, RequestKey
from ..lifecycle import Lifecycle
from ..metrics import RouterMetrics
from ..settings import RouterSettings
from ..store import AsyncStore
from .form import BATCH_PURPOSE, FORM_BYTES, FileForm, FileParams
from .quota import StorageQuota
from .transfers import Transfers

PIECE_BYTES = 512 * 1024
"""How much of a body is gathered before a thread takes it to the store."""
_Result = TypeVar("_Result")

log = get_logger(__name__)


class Uploads:
    """Stores the files that clients send to one Router."""

    def __init__(
        self,
        settings: RouterSettings,
        store: AsyncStore,
        idempotency: Idempotency,
        transfers: Transfers,
        quota: StorageQuota,
        metrics: RouterMetrics,
        lifecycle: Lifecycle,
    ) -> None:
        self._max_bytes = settings.max_file_bytes
        self._batch_file_life_s = settings.batch_file_expiry_s
        self._store = store
        self._idempotency = idempotency
        self._transfers = transfers
        self._quota = quota
        self._metrics = metrics
        self._lifecycle = lifecycle

    async def upload(self, tenant: Tenant, receive: Receive, headers: Mapping[str, str], key: RequestKey) -> FileRecord:
        """The file that the request brings, once the store has it.

        Raises ``ClientGone`` if the client leaves before it is complete, else the error to answer. Then nothing of it
        stays in the store.
        """
        self._lifecycle.ensure_accepting()
        content_type = headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
            raise BadRequest("send the file as multipart/form-data with the fields file and purpose")
        boundary = boundary_of(content_type)
        length = headers.get("content-length")
        announced = announced_size(None if length is None else length.encode("latin-1"))
        check_size(announced, self._max_bytes + FORM_BYTES)
        with self._transfers.one(tenant):
            reservation = await self._quota.reserve(tenant, max(0, announced - FORM_BYTES))
            pending = _PendingFile(self._store, self._idempotency, tenant, FileForm(boundary), key, self._max_bytes)
            record = None
            try:
                size = 0
                async for piece in _pieces(receive):
                    size += len(piece)
                    check_size(size, self._max_bytes + FORM_BYTES)
                    reservation.grow(size - FORM_BYTES)
                    await pending.write(piece)
                    self._metrics.file_bytes("in", len(piece))
                reservation.grow(pending.size)
                record = await pending.finish(self._batch_file_life_s)
                if not pending.is_new:
                    pending.discard()
            except BaseException:
                pending.discard()
                raise
            finally:
                reservation.end(record.bytes if record is not None and pending.is_new else None)
        log.info("file_uploaded", file_id=record.id, tenant=tenant, bytes=record.bytes, purpose=record.purpose)
        return record


async def _pieces(receive: Receive) -> AsyncIterator[bytes]:
    """The body in pieces large enough to be worth a thread's work."""
    gathered = bytearray()
    more = True
    while more:
        message = await receive()  # ended by the connection if it is silent or slow
        if message["type"] != "http.request":
            raise ClientGone
        gathered += message.get("body", b"")
        more = message.get("more_body", False)
        if gathered and (len(gathered) >= PIECE_BYTES or not more):
            yield bytes(gathered)
            gathered.clear()


class _PendingFile:
    """One file on its way into the store. Its blocking steps run in threads, one after the other."""

    def __init__(
        self,
        store: AsyncStore,
        idempotency: Idempotency,
        tenant: Tenant,
        form: FileForm,
        key: RequestKey,
        max_bytes: int,
    ) -> None:
        self._store = store
        self._idempotency = idempotency
        self._tenant = tenant
        self._form = form
        self._key = key
        self._max_bytes = max_bytes
        self._id = new_file_id(time.time_ns() // 1_000_000)
        self._upload: Upload | None = None
        self._record: FileRecord | None = None
        self._step_running = False
        self._discarding = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of the file so far."""
        return self._upload.size if self._upload is not None else 0

    @property
    def is_new(self) -> bool:
        """Whether it has become a file, and not the file of an earlier try of the same request."""
        return self._record is not None

    async def write(self, data: bytes) -> None:
        """The next bytes of the form."""
        await self._in_thread(lambda: self._write(data))

    async def finish(self, batch_life_s: int) -> FileRecord:
        """The form is complete: make it a file, or find the file that an earlier try with the same key made.

        Raises ``IdempotencyKeyReused`` for a key that was sent with another file.
        """
        return await self._in_thread(lambda: self._finish(batch_life_s))

    def discard(self) -> None:
        """Remove all of it from the store; now, or once the step that runs has ended."""
        if not self._step_running:
            self._store.in_background(self._discard)

    async def _in_thread(self, step: Callable[[], _Result]) -> _Result:
        def tracked() -> _Result:
            try:
                return step()
            finally:
                self._step_running = False

        self._step_running = True
        return await self._store.run(tracked, undo=self._discard)

    def _write(self, data: bytes) -> None:
        for piece in self._form.feed(data):
            self._opened().write(piece)

    def _finish(self, batch_life_s: int) -> FileRecord:
        params = self._form.finish()
        upload, now = self._opened(), int(time.time())
        life_s = params.life_s or (batch_life_s if params.purpose == BATCH_PURPOSE else 0)
        earlier = self._earlier(params, upload, now) if self._key.value else None
        if earlier is not None:
            return earlier
        upload.commit()
        self._record = FileRecord(
            id=self._id,
            tenant=self._tenant,
            filename=params.filename,
            purpose=params.purpose,
            created_at=now,
            bytes=upload.size,
            expires_at=now + life_s if life_s else None,
            sha256=upload.sha256,
            parts=upload.parts,
        )
        self._store.files.add(self._record)
        return self._record

    def _earlier(self, params: FileParams, upload: Upload, now: int) -> FileRecord | None:
        """The file of an earlier try; None if there is none, or not any more."""
        content = [params, upload.size, upload.sha256]
        execution = self._idempotency.begin(self._tenant, self._key, "upload file", content, self._id, now * 1000)
        if execution.is_first:
            return None
        found = self._store.files.get(self._tenant, execution.result, now)
        if found is None:
            self._idempotency.repeat(execution, self._id)
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

"""Files and batches through a Router. Requests that can be repeated are retried."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import BaseModel, ConfigDict

from ..client import ASK_LIMIT_S, BACKOFF, TRIES, RequestFailed, RouterClient, parse, path_part, with_retries

SILENCE_LIMIT_S = 120.0
"""How long an upload or a download may stand still."""
_PIECE_BYTES = 1 << 18
_BATCHES, _FILES = "/v1/batches", "/v1/files"


class Counts(BaseModel):
    """How many lines of a batch there are, and how many have completed or failed."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class LineError(BaseModel):
    """What is wrong with a batch; ``line`` counts from 1."""

    code: str | None = None
    message: str | None = None
    param: str | None = None
    line: int | None = None


class _Errors(BaseModel):
    data: list[LineError] = []


class BatchView(BaseModel):
    """A batch as the Router shows it. Times are Unix seconds."""

    model_config = ConfigDict(extra="allow")

    id: str
    status: str
    endpoint: str
    created_at: int
    in_progress_at: int | None = None
    model: str | None = None
    request_counts: Counts = Counts()
    errors: _Errors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def ended(self) -> bool:
        return self.status in {"completed", "failed", "expired", "cancelled"}

    @property
    def line_errors(self) -> list[LineError]:
        """Why its input file was refused."""
        return self.errors.data if self.errors else []


class _File(BaseModel):
    id: str
    bytes: int


class BatchClient(RouterClient):
    """All methods raise :class:`RequestFailed`."""

    async def upload(self, path: Path, filename: str) -> str:
        """Upload a batch's input file, piece by piece; its id. A broken upload is repeated."""

        async def attempt() -> str:
            with path.open("rb") as file:
                form = aiohttp.FormData({"purpose": "batch"})
                form.add_field("file", file, filename=filename, content_type="application/jsonl")
                limit = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_LIMIT_S, sock_connect=ASK_LIMIT_S)
                return parse(_File, await self.call("POST", _FILES, data=form, timeout=limit)).id

        return await with_retries(attempt)

    async def create(
        self, input_file_id: str, endpoint: str, window: str, metadata: Mapping[str, str] | None
    ) -> BatchView:
        """Create a batch. Retries after a lost answer create no second one."""
        body: dict[str, object] = {"input_file_id": input_file_id, "endpoint": endpoint, "completion_window": window}
        if metadata:
            body["metadata"] = dict(metadata)
        headers = {"idempotency-key": secrets.token_hex(16)}
        return parse(BatchView, await with_retries(lambda: self.send_json(_BATCHES, body, headers=headers)))

    async def batch(self, batch_id: str) -> BatchView:
        return parse(BatchView, await self.call("GET", f"{_BATCHES}/{_id(batch_id)}"))

    async def batches(self, limit: int) -> list[BatchView]:
        """The newest ``limit`` batches."""
        return await self.get_all(_BATCHES, BatchView, limit)

    async def cancel(self, batch_id: str) -> BatchView:
        path = f"{_BATCHES}/{_id(batch_id)}/cancel"
        return parse(BatchView, await with_retries(lambda: self.call("POST", path)))

    async def size(self, file_id: str) -> int:
        """A file's size in bytes."""
        return parse(_File, await self.get(f"{_FILES}/{file_id}")).bytes

    async def content(self, file_id: str, start: int, size: int) -> AsyncIterator[bytes]:
        """The bytes of a file from ``start`` to its end at ``size``. A broken download continues where it stopped."""
        at, failures = start, 0
        while at < size:
            try:
                async for piece in self._content_from(file_id, at, size):
                    at += len(piece)
                    failures = 0
                    yield piece
            except RequestFailed as refused:
                failures += 1
                if not refused.transient or failures >= TRIES:
                    raise
                await asyncio.sleep(BACKOFF.pause_s(failures))

    async def _content_from(self, file_id: str, start: int, size: int) -> AsyncIterator[bytes]:
        limit = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_LIMIT_S, sock_connect=ASK_LIMIT_S)
        headers = {"range": f"bytes={start}-", "accept-encoding": "identity"} if start else {}
        async with self.opened("GET", f"{_FILES}/{file_id}/content", headers=headers, timeout=limit) as answer:
            if start and answer.status != 206:
                raise RequestFailed("the Router does not answer range requests for files", http_status=answer.status)
            at = start
            async for piece in answer.content.iter_chunked(_PIECE_BYTES):
                at += len(piece)
                yield piece
        if at < size:
            raise RequestFailed(f"the content of {file_id} broke off at byte {at} of {size}")


def _id(batch_id: str) -> str:
    return path_part(batch_id, "a batch", "inferq batch list")


def fields_of(view: BatchView) -> dict[str, Any]:
    """All fields of the Router's answer."""
    return view.model_dump(mode="json")

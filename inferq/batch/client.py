"""Files and batches as the commands ask a Router for them. The network may fail: what can be asked again is."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import orjson
from pydantic import BaseModel, ConfigDict

from telemetry.backoff import Backoff

from ..client import ASK_LIMIT_S, FabricClient, FabricRefused

SILENCE_LIMIT_S = 120.0
"""How long an upload or a download may stand still."""
TRIES = 5
_BACKOFF = Backoff(0.5, 8.0)
_PASSING = frozenset({0, 408, 429, 500, 502, 503, 504})
_PIECE_BYTES = 1 << 18
_BATCHES, _FILES = "/v1/batches", "/v1/files"
_Answer = TypeVar("_Answer")


class Counts(BaseModel):
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
        """What its input file was refused for."""
        return self.errors.data if self.errors else []


class BatchPage(BaseModel):
    data: list[BatchView]
    has_more: bool = False


class _File(BaseModel):
    id: str
    bytes: int


class BatchClient(FabricClient):
    """All methods raise :class:`FabricRefused`."""

    async def upload(self, path: Path, filename: str) -> str:
        """Upload a batch's input file, piece by piece; its id. An upload that broke off is made again."""

        async def attempt() -> str:
            with path.open("rb") as file:
                form = aiohttp.FormData({"purpose": "batch"})
                form.add_field("file", file, filename=filename, content_type="application/jsonl")
                limit = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_LIMIT_S, sock_connect=ASK_LIMIT_S)
                return self.parsed(_File, await self.call("POST", _FILES, data=form, timeout=limit)).id

        return await again(attempt)

    async def create(
        self, input_file_id: str, endpoint: str, window: str, metadata: Mapping[str, str] | None
    ) -> BatchView:
        """Create a batch, once, though the answer may be lost on the way."""
        asked = {"input_file_id": input_file_id, "endpoint": endpoint, "completion_window": window}
        body = orjson.dumps(asked | ({"metadata": dict(metadata)} if metadata else {}))
        headers = {"content-type": "application/json", "idempotency-key": secrets.token_hex(16)}
        return await again(lambda: self._view(self.call("POST", _BATCHES, data=body, headers=headers)))

    async def batch(self, batch_id: str) -> BatchView:
        return await self._view(self.call("GET", f"{_BATCHES}/{_named(batch_id)}"))

    async def batches(self, after: str, limit: int) -> BatchPage:
        query = f"?limit={limit}" + (f"&after={_named(after)}" if after else "")
        return self.parsed(BatchPage, await self.call("GET", _BATCHES + query))

    async def cancel(self, batch_id: str) -> BatchView:
        return await again(lambda: self._view(self.call("POST", f"{_BATCHES}/{_named(batch_id)}/cancel")))

    async def size(self, file_id: str) -> int:
        """A file's size in bytes."""
        answer = await again(lambda: self.call("GET", f"{_FILES}/{file_id}"))
        return self.parsed(_File, answer).bytes

    async def content(self, file_id: str, start: int, size: int) -> AsyncIterator[bytes]:
        """The bytes of a file from ``start`` to its end at ``size``. Where it breaks off, it is asked for the rest."""
        at, failures = start, 0
        while at < size:
            try:
                async for piece in self._content_from(file_id, at, size):
                    at += len(piece)
                    failures = 0
                    yield piece
            except FabricRefused as refused:
                failures += 1
                if not passing(refused) or failures >= TRIES:
                    raise
                await asyncio.sleep(_BACKOFF.pause_s(failures))

    async def _content_from(self, file_id: str, start: int, size: int) -> AsyncIterator[bytes]:
        limit = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_LIMIT_S, sock_connect=ASK_LIMIT_S)
        headers = {"range": f"bytes={start}-", "accept-encoding": "identity"} if start else {}
        async with self.opened("GET", f"{_FILES}/{file_id}/content", headers=headers, timeout=limit) as answer:
            if start and answer.status != 206:
                raise FabricRefused("the Router does not give parts of files", answered=answer.status)
            at = start
            async for piece in answer.content.iter_chunked(_PIECE_BYTES):
                at += len(piece)
                yield piece
        if at < size:
            raise FabricRefused(f"the content of {file_id} broke off at byte {at} of {size}")

    async def _view(self, asked: Awaitable[bytes]) -> BatchView:
        return self.parsed(BatchView, await asked)


def passing(refused: FabricRefused) -> bool:
    """Whether the same call may succeed a little later."""
    return refused.answered in _PASSING


async def again(attempt: Callable[[], Awaitable[_Answer]]) -> _Answer:
    """What ``attempt`` answers, tried up to ``TRIES`` times while what keeps it from succeeding may pass."""
    return await _BACKOFF.retry(
        attempt, when=lambda error: isinstance(error, FabricRefused) and passing(error), max_attempts=TRIES
    )


def _named(batch_id: str) -> str:
    """Only what can be an id becomes part of a path."""
    if not batch_id.replace("_", "").replace("-", "").isalnum() or not batch_id.isascii():
        raise FabricRefused(f"{batch_id!r} is not the id of a batch: `inferq batch list` shows them", answered=404)
    return batch_id


def fields_of(view: BatchView) -> dict[str, Any]:
    """All fields that the Router gave."""
    return view.model_dump(mode="json")

"""Executes each request that changes the file store once, however often the client sends it.

A repetition is recognised by its ``Idempotency-Key``. The OpenAI SDK repeats requests without a key and only says that
it does (``x-stainless-retry-count``), which proves nothing: the earlier try may never have arrived. Such a request is a
repetition if there is a record of the same request whose response was never sent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask

from queue_schemas import IdempotencyKeyReused, Tenant
from storage import RequestRecord

from .http.rules import IDEMPOTENCY_HEADER, read_idempotency_key
from .store import AsyncStore

_RETRY_HEADER = "x-stainless-retry-count"
_UNANSWERED_MS = 660_000
"""Longer than the SDK waits for a response (600 s) before it repeats the request."""


@dataclass(frozen=True, slots=True)
class RequestKey:
    """The idempotency key of a request, empty without one, and whether its client says that this is a retry."""

    value: str = ""
    is_retry: bool = False


@dataclass(frozen=True, slots=True)
class Execution:
    """The execution of one request. ``is_first``: it has to be carried out now; else an earlier try was, at
    ``record.created_ms``. ``result`` is the id of what it makes."""

    tenant: Tenant
    name: str
    record: RequestRecord
    is_first: bool
    has_key: bool

    @property
    def result(self) -> str:
        return self.record.result


def read_request_key(request: Request) -> RequestKey:
    """Raises ``BadRequest`` for a malformed key."""
    header = request.headers.get(IDEMPOTENCY_HEADER)
    key = read_idempotency_key(None if header is None else header.encode("latin-1"))
    return RequestKey(key, request.headers.get(_RETRY_HEADER, "0") != "0")


class Idempotency:
    """The executions of all tenants' requests. All methods but :meth:`response` block: call them in threads."""

    def __init__(self, store: AsyncStore, keep_ms: int) -> None:
        """``keep_ms``: how long a key leads to what it made."""
        self._store = store
        self._records = store.requests
        self._keep_ms = keep_ms

    def begin(
        self, tenant: Tenant, key: RequestKey, operation: str, params: object, result: str, now_ms: int
    ) -> Execution:
        """The execution of ``operation`` with ``params`` that is to make ``result``, or the earlier one.

        Raises ``IdempotencyKeyReused`` for a key that was sent with another request.
        """
        digest = hashlib.sha256(
            orjson.dumps([operation, params], option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
        ).hexdigest()
        life_ms = self._keep_ms if key.value else _UNANSWERED_MS
        own = RequestRecord(request=digest, result=result, created_ms=now_ms, expires_ms=now_ms + life_ms)
        if key.value:
            name = self._records.of_key(key.value)
            record = self._records.claim(tenant, name, own, now_ms)
            if record.request != digest:
                raise IdempotencyKeyReused(
                    f"this {IDEMPOTENCY_HEADER} belongs to another request: send a new key, or the same request",
                    param=IDEMPOTENCY_HEADER,
                )
            return Execution(tenant, name, record, record == own, True)
        name = self._records.of_request(digest)
        before = self._records.get(tenant, name) if key.is_retry else None
        if before is not None and now_ms < before.expires_ms:
            return Execution(tenant, name, before, False, False)
        self._records.put(tenant, name, own)
        return Execution(tenant, name, own, True, False)

    def repeat(self, execution: Execution, result: str) -> Execution:
        """Carry a request out again, to make ``result``: the earlier try came to nothing."""
        record = execution.record.model_copy(update={"result": result})
        self._records.put(execution.tenant, execution.name, record)
        return Execution(execution.tenant, execution.name, record, True, execution.has_key)

    def abandon(self, execution: Execution) -> None:
        """Nothing was made: the key is free again."""
        if execution.is_first:
            self._records.release(execution.tenant, execution.name, execution.record)

    async def response(self, request: Request, execution: Execution, body: dict[str, Any]) -> JSONResponse:
        """The response to a request. Once a client that is still there has received it, a request without a key is
        over: the same request sent again is a new one."""
        response = JSONResponse(body)
        if execution.has_key or await request.is_disconnected():
            return response
        release = self._records.release

        async def received() -> None:
            self._store.in_background(lambda: release(execution.tenant, execution.name, execution.record))

        response.background = BackgroundTask(received)
        return response

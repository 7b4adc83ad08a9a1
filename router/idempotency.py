"""Requests that change the file store, each carried out once however often it is sent.

A repetition is recognised by its ``Idempotency-Key``; without one, by a record of the same request whose answer was
never sent, for the SDK repeats such a request without a key and only says that it does (``x-stainless-retry-count``).
That header alone proves nothing: the earlier try may never have arrived.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask

from queue_schemas import IdempotencyKeyReused, Tenant
from storage import RequestRecord, RequestRecords

from .http.rules import IDEMPOTENCY_HEADER, read_idempotency_key

_RETRY_HEADER = "x-stainless-retry-count"
_UNANSWERED_MS = 660_000
"""Longer than the SDK waits for an answer (600 s) before it repeats the request."""


@dataclass(frozen=True, slots=True)
class Sent:
    """How a request was sent: under which key, empty without one, and whether its client says that it repeats it."""

    key: str = ""
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to carry a request out, or, unless ``first``, the record of who had it. ``record.result`` names what it
    makes."""

    tenant: Tenant
    name: str
    record: RequestRecord
    first: bool
    keyed: bool


def read_sent(request: Request) -> Sent:
    """Raises ``BadRequest`` for a key that is none."""
    header = request.headers.get(IDEMPOTENCY_HEADER)
    key = read_idempotency_key(None if header is None else header.encode("latin-1"))
    return Sent(key, request.headers.get(_RETRY_HEADER, "0") != "0")


class Idempotency:
    """Claims on requests of all tenants. All methods but :meth:`answer` block: they are called in threads."""

    def __init__(self, records: RequestRecords, keep_ms: int) -> None:
        """``keep_ms``: how long a key leads to what it made."""
        self._records = records
        self._keep_ms = keep_ms

    def claim(self, tenant: Tenant, sent: Sent, operation: str, asked: object, result: str, now_ms: int) -> Claim:
        """The claim on ``operation`` with the parameters ``asked`` that is to make ``result``.

        Raises ``IdempotencyKeyReused`` for a key that was sent with another request.
        """
        request = hashlib.sha256(
            orjson.dumps([operation, asked], option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
        ).hexdigest()
        life_ms = self._keep_ms if sent.key else _UNANSWERED_MS
        own = RequestRecord(request=request, result=result, created_ms=now_ms, expires_ms=now_ms + life_ms)
        if sent.key:
            name = self._records.of_key(sent.key)
            record = self._records.claim(tenant, name, own, now_ms)
            if record.request != request:
                raise IdempotencyKeyReused(
                    f"this {IDEMPOTENCY_HEADER} belongs to another request: send a new key, or the same request",
                    param=IDEMPOTENCY_HEADER,
                )
            return Claim(tenant, name, record, record == own, True)
        name = self._records.of_request(request)
        before = self._records.get(tenant, name) if sent.repeated else None
        if before is not None and now_ms < before.expires_ms:
            return Claim(tenant, name, before, False, False)
        self._records.put(tenant, name, own)
        return Claim(tenant, name, own, True, False)

    def renew(self, claim: Claim, result: str) -> Claim:
        """The claim that takes the place of one that came to nothing, to make ``result``."""
        record = claim.record.model_copy(update={"result": result})
        self._records.put(claim.tenant, claim.name, record)
        return Claim(claim.tenant, claim.name, record, True, claim.keyed)

    def release(self, claim: Claim) -> None:
        """Nothing was made: the key is free again."""
        if claim.first:
            self._records.release(claim.tenant, claim.name, claim.record)

    async def answer(
        self, request: Request, claim: Claim, body: dict[str, Any], later: Callable[[Callable[[], object]], None]
    ) -> JSONResponse:
        """The answer to a request. Once a client that is still there has got it, a request without a key is over: the
        same one sent again is another. ``later`` does something in a thread."""
        answer = JSONResponse(body)
        if claim.keyed or await request.is_disconnected():
            return answer
        release = self._records.release

        async def answered() -> None:
            later(lambda: release(claim.tenant, claim.name, claim.record))

        answer.background = BackgroundTask(answered)
        return answer

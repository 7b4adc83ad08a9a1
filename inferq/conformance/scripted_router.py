"""The Router that a worker under test talks to: the worker protocol over a scripted queue, with faults on request."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel

from queue_schemas import Heartbeat, InferqError
from queue_schemas.worker_protocol.encoding import MSGPACK, decode, encode, media_type_of
from queue_schemas.worker_protocol.fields import WORKER_PREFIX
from queue_schemas.worker_protocol.messages import ClaimCall, Decline, Join, LeaseCall, Reconcile
from queue_schemas.worker_protocol.output import OutputCall, ReleaseCall, SettleCall

from .scripted_queue import MODEL, ScriptedQueue, given

LEASE_MS, HEARTBEAT_MS = 6_000, 300
MAX_CALL_BYTES = 16 << 20
_M = TypeVar("_M", bound=BaseModel)
LANES = ["interactive", "background", "batch"]


@dataclass
class Fault:
    """What happens to the next calls of a name instead of an answer: ``times`` of them; ``carried_out`` before that."""

    times: int = 1
    carried_out: bool = False
    answer: web.Response | None = None
    """None: the connection is closed without one."""


@dataclass
class Seen:
    """What the worker said of itself, call by call."""

    joins: list[Join] = field(default_factory=list)
    heartbeats: list[tuple[float, Heartbeat]] = field(default_factory=list)
    renewals: list[float] = field(default_factory=list)
    reconciles: list[Reconcile] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """Messages that break the protocol, in sentences."""


class ScriptedRouter:
    """Serves ``/worker/v1`` on loopback. Rules set what it answers."""

    def __init__(self, queue: ScriptedQueue, key: str) -> None:
        self.queue = queue
        self.seen = Seen()
        self.session_id = ""
        """Of the session that counts; calls of others are fenced."""
        self.faults: dict[str, list[Fault]] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        """Calls that are refused for now: status and code, by name; ``*`` for all."""
        self.drain = False
        self.lost_leases: set[str] = set()
        """What a reconcile is answered."""
        self.bytes_per_s: float | None = None
        """How slowly answers are sent."""
        self.url = ""
        self._key = key
        self._runner: web.AppRunner | None = None
        self._address = ("127.0.0.1", 0)
        self._held: dict[str, asyncio.Event] = {}
        self._assigned: list[dict[str, Any]] = []
        self._version = 0
        self._handlers: dict[str, Callable[[web.Request, bytes], Awaitable[dict[str, Any] | None]]] = {
            "sessions": self._on_sessions,
            "heartbeat": self._on_heartbeat,
            "renew": self._on_renew,
            "claim": self._on_claim,
            "output": self._on_output,
            "settle": self._on_settle,
            "release": self._on_release,
            "reconcile": self._on_reconcile,
            "decline": self._on_decline,
            "clear_suspicion": self._on_clear_suspicion,
            "elsewhere": self._on_elsewhere,
            "leave": self._on_leave,
        }

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; after :meth:`stop` on the same port."""
        app = web.Application(client_max_size=MAX_CALL_BYTES + 1)
        app.router.add_route("*", WORKER_PREFIX + "/sessions", self._serve)
        app.router.add_route("*", WORKER_PREFIX + "/sessions/{session}", self._serve)
        app.router.add_route("*", WORKER_PREFIX + "/sessions/{session}/{name}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        if not self._address[1]:
            self._address = (host, port)
        site = web.TCPSite(self._runner, *self._address, reuse_address=True)
        await site.start()
        self._address = self._runner.addresses[0][:2]
        self.url = f"http://{self._address[0]}:{self._address[1]}"

    async def stop(self) -> None:
        """Close the port and all connections, as a Router that dies."""
        runner, self._runner = self._runner, None
        if runner is not None:
            for connection in list(runner.server.connections if runner.server else ()):
                if connection.transport is not None:
                    connection.transport.abort()
            await runner.cleanup()

    def fail_next(self, name: str, fault: Fault) -> None:
        """Have ``fault`` happen to the next calls of ``name``."""
        self.faults.setdefault(name, []).append(fault)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info.get("name") or _NAMES.get(request.method, "")
        if "session" not in request.match_info:
            name = "sessions"
        self.seen.calls[name] += 1
        body = await self._body(request, name)
        fault = self._next_fault(name)
        if fault is not None and not fault.carried_out:
            return _break_off(request, fault)
        answer = await self._answer(request, name, body)
        self.queue.changed.set()
        if fault is not None:
            return _break_off(request, fault)
        return answer if self.bytes_per_s is None else await self._slowly(request, answer, self.bytes_per_s)

    async def _body(self, request: web.Request, name: str) -> bytes:
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge:
            self.seen.faults.append(f"{name}: a call of more than 16 MiB")
            raise
        except ConnectionError:  # the worker has left, or this Router is stopped
            raise web.HTTPBadRequest from None

    def _next_fault(self, name: str) -> Fault | None:
        queued = self.faults.get(name)
        if not queued:
            return None
        fault = queued[0]
        fault.times -= 1
        if fault.times <= 0:
            queued.pop(0)
        return fault

    async def _answer(self, request: web.Request, name: str, body: bytes) -> web.Response:
        if request.headers.get("authorization", "") != f"Bearer {self._key}":
            self.seen.faults.append(f"{name}: without the header authorization: Bearer KEY")
            return _error(401, "invalid_api_key")
        refusal = self.refusals.get(name) or self.refusals.get("*")
        if refusal is None and name != "sessions" and request.match_info["session"] != self.session_id:
            refusal = (409, "fenced")
        handler = self._handlers.get(name)
        if handler is None:
            self.seen.faults.append(f"{request.method} {request.path}: there is no such call")
            refusal = (404, "unknown_path")
        if refusal is not None or handler is None:
            return _error(*(refusal or (404, "unknown_path")))
        try:
            found = await handler(request, body)
        except InferqError as error:
            self.seen.faults.append(f"{name}: {error.message}")
            return _error(400, "bad_message")
        if found is None:
            return web.Response(status=204)
        media_type = MSGPACK if MSGPACK in request.headers.get("accept", "") else "application/json"
        return web.Response(body=encode(found, media_type), content_type=media_type)

    async def _on_sessions(self, request: web.Request, body: bytes) -> dict[str, Any]:
        join = _read(request, body, Join)
        self.seen.joins.append(join)
        if join.session_id != self.session_id and not join.again:
            self.queue.reset_session()
            self.session_id = join.session_id
        return {
            "shards": 1,
            "lease_ms": LEASE_MS,
            "heartbeat_interval_ms": HEARTBEAT_MS,
            "broker_url": "",
            "assignment": self._assignment(join.models),
        }

    async def _on_heartbeat(self, request: web.Request, body: bytes) -> dict[str, Any]:
        heartbeat = _read(request, body, Heartbeat)
        self.seen.heartbeats.append((_now(), heartbeat))
        return {"assignment": self._assignment(heartbeat.models), "drain": self.drain}

    async def _on_renew(self, _request: web.Request, _body: bytes) -> None:
        self.seen.renewals.append(_now())

    async def _on_claim(self, request: web.Request, body: bytes) -> dict[str, Any]:
        call = _read(request, body, ClaimCall)
        answer: dict[str, Any] = {}
        jobs: list[dict[str, Any]] = []
        if call.claim is not None:
            jobs = [given(attempt) for attempt in self.queue.claim(call.claim)]
            parked = len(jobs) < call.claim.n
            answer["claimed"] = {"jobs": jobs, "parked": parked, "handed_over": 0, "offered": 0}
        if not call.wait_ms:
            return answer
        await self._hold(call, 0.0 if jobs else call.wait_ms / 1000)
        answer["messages"] = list(self.queue.news(call))
        return answer

    async def _hold(self, call: ClaimCall, wait_s: float) -> None:
        """Wait for messages; a later call ends it."""
        if (before := self._held.get(self.session_id)) is not None:
            before.set()
        ended = self._held[self.session_id] = asyncio.Event()
        until = _now() + wait_s
        while not self.queue.has_news(call) and not ended.is_set() and _now() < until and self._runner is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # many reasons, no one event

    async def _on_output(self, request: web.Request, body: bytes) -> dict[str, Any]:
        attempts = _read(request, body, OutputCall).attempts
        return {"answers": [self.queue.take_output(one, _now()) for one in attempts]}

    async def _on_settle(self, request: web.Request, body: bytes) -> dict[str, Any]:
        attempts = _read(request, body, SettleCall).attempts
        return {"answers": [self.queue.settle(one, _now()) for one in attempts]}

    async def _on_release(self, request: web.Request, body: bytes) -> dict[str, Any]:
        attempts = _read(request, body, ReleaseCall).attempts
        return {"answers": [self.queue.release(one) for one in attempts]}

    async def _on_reconcile(self, request: web.Request, body: bytes) -> dict[str, Any]:
        reconcile = _read(request, body, Reconcile)
        self.seen.reconciles.append(reconcile)
        return {"lost": [lease for lease in reconcile.leases if lease in self.lost_leases]}

    async def _on_decline(self, request: web.Request, body: bytes) -> None:
        _read(request, body, Decline)

    async def _on_clear_suspicion(self, request: web.Request, body: bytes) -> None:
        _read(request, body, LeaseCall)

    async def _on_elsewhere(self, _request: web.Request, _body: bytes) -> dict[str, Any]:
        return {"served": True}

    async def _on_leave(self, request: web.Request, _body: bytes) -> None:
        self.seen.left.append(request.match_info["session"])

    def _assignment(self, models: list[str]) -> dict[str, Any]:
        pools = [{"pool": MODEL, "shard": 0, "lanes": LANES}] if MODEL in models and not self.drain else []
        if pools != self._assigned:
            self._assigned, self._version = pools, self._version + 1
        return {"term": 1, "version": self._version, "pools": pools}

    @staticmethod
    async def _slowly(request: web.Request, answer: web.Response, bytes_per_s: float) -> web.StreamResponse:
        body = answer.body if isinstance(answer.body, bytes) else b""
        slow = web.StreamResponse(status=answer.status, headers={"content-type": answer.content_type})
        slow.content_length = len(body)
        await slow.prepare(request)
        step = max(int(bytes_per_s / 50), 1)
        for start in range(0, len(body), step):
            await slow.write(body[start : start + step])
            await asyncio.sleep(0.02)
        await slow.write_eof()
        return slow


_NAMES = {"DELETE": "leave", "POST": "sessions"}


def _now() -> float:
    return asyncio.get_running_loop().time()


def _read(request: web.Request, body: bytes, kind: type[_M]) -> _M:
    return decode(body, media_type_of(request.headers.get("content-type", "")), kind)


def _error(status: int, code: str) -> web.Response:
    error = {"error": {"message": f"scripted: {code}", "type": "scripted", "param": None, "code": code}}
    return web.Response(status=status, body=json.dumps(error).encode(), content_type="application/json")


def _break_off(request: web.Request, fault: Fault) -> web.Response:
    if fault.answer is not None:
        return web.Response(status=fault.answer.status, body=fault.answer.body, content_type=fault.answer.content_type)
    if request.transport is not None:
        request.transport.abort()
    return web.Response()

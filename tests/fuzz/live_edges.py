"""Send bytes, bodies, control messages and stream entries to a live fleet."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import aiohttp
from redis.asyncio import Redis

from queue_schemas import HEAD, JOIN_TOKEN_HEADER, Frame, Heartbeat, Registration, new_job_id
from queue_schemas.frames import Marker, MarkerKind
from queue_schemas.keys import ShardKeys
from tests.support.fleet import Fleet

from .decoders import CHAT, ENDPOINT, RESPONSE, Broken
from .mutations import EDGE_BYTES, Json, Mutator

API_KEY = "sk-fuzz"
JOIN_TOKEN = "join-token-of-the-fuzz-run"
TENANT = "fuzz"

ANSWER_LIMIT_S = 2.0
_READ_BYTES = 256 * 1024
_ENTRIES_PER_BATCH = 50
_SERVER_ERROR = re.compile(rb"(?:\A|\r\n)HTTP/1\.[01] (5\d\d)")
_ALLOWED_STATUSES = (b"502", b"503", b"504", b"505")
"""Engine unavailable, queue full, a deadline that the input itself set, an unsupported version of HTTP. Never 500."""
_LOOPBACK_URLS = ("http://127.0.0.1:1", "http://127.0.0.1:9/x", "http://[::1]:1", "http://localhost:1", None)
"""Addresses that a fuzzed worker may announce. The Manager connects to them, so they are all on this machine."""
_HTTP_WORDS = (
    *EDGE_BYTES, b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Transfer-Encoding : chunked\r\n",
    b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"Connection: Upgrade, HTTP2-Settings\r\n",
    b"Connection: close\r\n",
    b"Content-Encoding: gzip\r\n", b"X: " + b"y" * 9_000 + b"\r\n", b" folded\r\n", b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"5;ext=1\r\n", b"HTTP/1.0", b"HTTP/2.0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET ", b"OPTIONS * ", b"CONNECT ",
    b"http://evil.example/", b"Host: evil.example\r\n", b"Origin: null\r\n", b"Range: bytes=0-,-1\r\n", b"?a=%ff&b",
    b"X-Inferq-Deadline-Ms: 1\r\n", b"X-Inferq-Resumable: true\r\n", b"Last-Event-ID: 1\r\n", b"Idempotency-Key: k\r\n",
)  # fmt: skip
_GETS = (
    "/v1/models", "/v1/models/sim", "/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/jobs", "/v1/files",
    "/v1/batches", "/v1/webhook_endpoints", "/fabric/v1/pools", "/fabric/v1/workers", "/fabric/v1/dead", "/", "/docs",
    "/health", "/version", "/v1/files/file-" + "0" * 32 + "/content",
    "/v1/responses/resp_x?stream=true&starting_after=1",
)  # fmt: skip
_COMPLETION: Json = {"model": "sim", "prompt": "a b c", "max_tokens": 3, "stream": True, "n": 1}
_EMBEDDING: Json = {"model": "sim", "input": ["a", "b"], "encoding_format": "float"}
_MESSAGE: Json = {"model": "sim", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}], "stream": True}
_TOKENS: Json = {"model": "sim", "prompt": "hi"}
_BATCH: Json = {
    "input_file_id": "file-" + "0" * 32, "endpoint": "/v1/chat/completions", "completion_window": "24h",
    "metadata": {"a": "b"},
}  # fmt: skip
_BODIES: tuple[tuple[str, Json], ...] = (
    ("/v1/chat/completions", CHAT), ("/v1/chat/completions", CHAT), ("/v1/completions", _COMPLETION),
    ("/v1/embeddings", _EMBEDDING), ("/v1/responses", RESPONSE), ("/v1/responses", RESPONSE | {"background": False}),
    ("/v1/messages", _MESSAGE), ("/tokenize", _TOKENS),
    ("/v1/rerank", {"model": "sim", "query": "q", "documents": ["d"]}),
    ("/v1/batches", _BATCH), ("/v1/webhook_endpoints", ENDPOINT), ("/fabric/v1/dead/purge", {"ids": ["0:1-0"]}),
)  # fmt: skip
_SHORT = {"max_tokens": 4, "timeout": 5}
_CHAT_KEYS = ("x-inferq-deadline-ms", "x-inferq-on-loss", "x-inferq-resumable", "idempotency-key", "last-event-id")


@dataclass
class LiveEdge:
    """One live edge: ``feed`` sends some inputs and returns how many, or raises :class:`Broken`."""

    feed: Callable[[Mutator], Awaitable[int]]
    tasks: int


class LiveEdges:
    """The live edges of ``fleet``, whose session sends its credentials by itself."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._redis: Redis = fleet.server.client()
        self._keys = ShardKeys(0)
        self._schemas = {message: message.model_json_schema() for message in (Registration, Heartbeat)}
        self._ports = [role.port for role in (fleet.router, fleet.router, fleet.manager, *fleet.workers)]
        self._requests = _raw_requests()

    @property
    def by_name(self) -> Mapping[str, LiveEdge]:
        """By name."""
        return {
            "HTTP bytes": LiveEdge(self.http_bytes, 8),
            "HTTP bodies": LiveEdge(self.bodies, 4),
            "control-plane requests": LiveEdge(self.control, 3),
            "stream entries": LiveEdge(self.entries, 1),
        }

    async def close(self) -> None:
        """End the connection to Redis."""
        await self._redis.aclose()

    async def http_bytes(self, mutator: Mutator) -> int:
        """A connection with one to three requests, mutated as bytes, in one write or in pieces."""
        count = 1 + int(mutator.chance(0.3)) + int(mutator.chance(0.2))
        data = b"".join(mutator.pick(self._requests) for _ in range(count))
        data = mutator.bytes_of(data, _HTTP_WORDS)
        with contextlib.suppress(OSError):  # the server may cut it off
            reader, writer = await asyncio.open_connection("127.0.0.1", mutator.pick(self._ports))
            try:
                at = mutator.random.randrange(len(data) + 1) if mutator.chance(0.3) else len(data)
                writer.write(data[:at])
                if at < len(data):
                    await asyncio.sleep(0)
                    writer.write(data[at:])
                if mutator.chance(0.9):
                    writer.write_eof()
                    answer = await _until_end(reader)
                    found = _SERVER_ERROR.search(answer)
                    if found and found[1] not in _ALLOWED_STATUSES:
                        raise Broken(f"{found[1].decode()} to {data[:400]!r}: {answer[:400]!r}")
            finally:
                writer.transport.abort()
        return count

    async def bodies(self, mutator: Mutator) -> int:
        """A well-formed POST with a mutated body, or a GET with odd parameters."""
        headers = {"content-type": "application/json"}
        if mutator.chance(0.15):
            await self._ask(
                "GET", mutator.pick(_GETS), headers, {"limit": mutator.text(), "after": mutator.text()}, b""
            )
            return 1
        path, seed = mutator.pick(_BODIES)
        value = mutator.json_of(seed)
        if isinstance(value, dict) and "model" in value:
            value |= _SHORT if mutator.chance(0.8) else {}
        body = json.dumps(value).encode()
        if mutator.chance(0.1):
            body = mutator.bytes_of(body)
        if mutator.chance(0.15):
            headers[mutator.pick(_CHAT_KEYS)] = _header_text(mutator.text())
        await self._ask("POST", path, headers, {}, body)
        return 1

    async def control(self, mutator: Mutator) -> int:
        """A registration, heartbeat or deregistration, well typed and extreme, of a worker that may exist."""
        fleet = self._fleet
        role = mutator.pick((fleet.router, fleet.manager))
        name = mutator.pick(("intruder-1", "intruder-2", fleet.workers[0].name, mutator.text()[:80].replace("/", "_")))
        run = f"{name}.{mutator.random.randrange(2**64):016x}"
        message = mutator.pick((Registration, Heartbeat))
        schema = self._schemas[message]
        value = mutator.of_schema(schema, schema.get("$defs", {}))
        value |= {"session_id": run} if mutator.chance(0.8) else {}
        path = "/fabric/v1/workers"
        if message is Registration:
            value["url"] = mutator.pick(_LOOPBACK_URLS)
            value |= {"worker_id": name} if mutator.chance(0.8) else {}
        else:
            path = f"{path}/{name}/heartbeat"
        headers = {"content-type": "application/json"}
        if message is Heartbeat and mutator.chance(0.3):
            path, kind = f"/fabric/v1/workers/{name}", mutator.pick(("check", "DELETE"))
            method, path = ("DELETE", path) if kind == "DELETE" else ("POST", f"{path}/{kind}")
            await self._ask(method, path, headers, {"session_id": run}, b"", role.url)
        else:
            await self._ask("POST", path, headers, {}, json.dumps(value).encode(), role.url)
        return 1

    async def entries(self, mutator: Mutator) -> int:
        """Entries in the streams that Routers and workers read: mutated frames and markers, control messages."""
        targets = [key for kind in ("reply", "ctl") async for key in self._redis.scan_iter(self._pattern(kind))]
        if not targets:
            await asyncio.sleep(0.05)
            return 0
        pipeline = self._redis.pipeline(transaction=False)
        for _ in range(_ENTRIES_PER_BATCH):
            pipeline.xadd(mutator.pick(targets), self._entry(mutator), nomkstream=True)
        await pipeline.execute(raise_on_error=False)
        await asyncio.sleep(0.02)
        return _ENTRIES_PER_BATCH

    def _entry(self, mutator: Mutator) -> dict[bytes | str, bytes | str]:
        job_id = new_job_id(mutator.pick((0, 0, 1, 9_999)))
        roll = mutator.random.random()
        if roll < 0.4:
            number = mutator.pick((0, 1, 2**31, 2**63 - 1))
            frame = Frame(
                job_id, number, mutator.text()[:50], number, HEAD, mutator.text().encode(), 200, "text/plain"
            ).pack()
            return {"f": mutator.bytes_of(frame) if mutator.chance(0.5) else frame}
        if roll < 0.7:
            marker = Marker(mutator.pick(tuple(MarkerKind)), job_id, mutator.pick((0, 1, 2**63)), mutator.text()).pack()
            return {"m": mutator.bytes_of(marker) if mutator.chance(0.5) else marker}
        kind = mutator.pick(("abort", "wake", "ping", "abort", mutator.text()))
        kind = "ping" if kind == "drain" else kind
        return {"k": kind, "job": job_id if mutator.chance(0.5) else mutator.text(), "why": mutator.text()}

    def _pattern(self, kind: str) -> str:
        return self._keys.prefix.replace("{", "[{]") + f"{kind}:*"

    async def _ask(
        self, method: str, path: str, headers: Mapping[str, str], query: Mapping[str, str], body: bytes, url: str = ""
    ) -> None:
        where = (url or self._fleet.router.url) + path
        try:
            async with self._fleet.session.request(
                method, where, headers=headers, params=query, data=body or None, allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=30),
            ) as answer:  # fmt: skip
                head = await answer.content.read(_READ_BYTES)
                if answer.status >= 500 and str(answer.status).encode() not in _ALLOWED_STATUSES:
                    raise Broken(f"{answer.status} to {method} {path} {body[:400]!r}: {head[:400]!r}")
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, aiohttp.ClientOSError):
            return  # the request was cut off; the run checks separately that the process lives
        except (aiohttp.InvalidURL, ValueError):
            return  # nothing was sent
        except TimeoutError:
            raise Broken(f"no answer within 30 s to {method} {path} {body[:400]!r}") from None


async def _until_end(reader: asyncio.StreamReader) -> bytes:
    pieces = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ANSWER_LIMIT_S):
            while piece := await reader.read(_READ_BYTES):
                pieces.append(piece)
    return b"".join(pieces)


def _header_text(text: str) -> str:
    return "".join(sign if " " <= sign <= "~" else "?" for sign in text)[:200]


def _raw_requests() -> tuple[bytes, ...]:
    """Requests as bytes: every method and framing that a client may use."""
    common = f"Host: 127.0.0.1\r\nAuthorization: Bearer {API_KEY}\r\n"
    token = f"{JOIN_TOKEN_HEADER}: {JOIN_TOKEN}\r\n"
    json_type = "Content-Type: application/json\r\n"
    form_type = "Content-Type: multipart/form-data; boundary=B\r\n"
    chat = json.dumps({"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})
    stream = chat[:-1] + ', "stream": true}'
    part = "--B\r\nContent-Disposition: form-data; name={}\r\n\r\n{}\r\n"
    form = part.format('"purpose"', "batch") + part.format('"file"; filename="a"', "x") + "--B--\r\n"
    chunks = "".join(f"{len(piece):x}\r\n{piece}\r\n" for piece in (chat[:9], chat[9:])) + "0\r\nT: r\r\n\r\n"

    def ask(line: str, headers: str = "", body: str | None = None) -> bytes:
        length = "" if body is None else f"Content-Length: {len(body)}\r\n"
        return f"{line}\r\n{common}{headers}{length}\r\n{body or ''}".encode()

    return (
        ask("POST /v1/chat/completions HTTP/1.1", json_type, chat),
        ask("POST /v1/chat/completions HTTP/1.1", json_type, stream),
        ask("POST /v1/messages HTTP/1.1", json_type + "X-Inferq-Resumable: true\r\n", stream),
        ask("POST /v1/chat/completions HTTP/1.1", json_type + "Transfer-Encoding: chunked\r\n") + chunks.encode(),
        ask("POST /v1/chat/completions HTTP/1.0", json_type, stream),
        ask("POST /v1/files HTTP/1.1", form_type + "Expect: 100-continue\r\n", form),
        ask("POST /fabric/v1/workers HTTP/1.1", json_type + token, "{}"),
        ask("POST /fabric/v1/workers/intruder-1/heartbeat HTTP/1.1", json_type + token, "{}"),
        *(ask(f"GET {path} HTTP/1.1", token) for path in _GETS),
        ask("HEAD /v1/models HTTP/1.1"),
        ask("OPTIONS /v1/chat/completions HTTP/1.1", "Origin: http://a.example\r\n"),
        ask("DELETE /v1/files/file-x HTTP/1.1"),
    )

"""The worker that a Router under test is checked by: each call as the rule says it, in JSON."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from queue_schemas.worker_protocol.fields import WORKER_PREFIX

from .scorecard import Broken

LANES = ["interactive", "background", "batch"]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a call; ``message`` is empty for one without content."""

    status: int
    message: dict[str, Any]

    @property
    def code(self) -> str:
        """That of an error; empty for none."""
        error = self.message.get("error")
        return str(error.get("code")) if isinstance(error, dict) else ""


class ScriptedWorker:
    """One session of a worker called ``name`` that serves ``model``."""

    def __init__(
        self, http: aiohttp.ClientSession, url: str, headers: Mapping[str, str], name: str, model: str, slots: int = 4
    ) -> None:
        self.name = name
        self.model = model
        self.session_id = f"{name}.{secrets.token_hex(8)}"
        self.shard = 0
        self.lease_ms = 0
        self.seq = 0
        self.turn = 0
        self.after = "0"
        self._http = http
        self._url = url.rstrip("/") + WORKER_PREFIX
        self._headers = headers
        self._slots = slots

    @property
    def status(self) -> dict[str, Any]:
        """What it says of itself."""
        return {"session_id": self.session_id, "models": [self.model], "slots": self._slots, "engine": "ready"}

    async def join(self, **fields: Any) -> Reply:
        """Join; the assignment says on which shard it claims."""
        reply = await self.request("POST", "/sessions", {"worker_id": self.name, **self.status, **fields})
        if reply.status == 200:
            self.lease_ms = reply.message["lease_ms"]
            for pool in reply.message["assignment"]["pools"]:
                if pool["pool"] == self.model:
                    self.shard = pool["shard"]
        return reply

    async def call(self, name: str, message: Mapping[str, Any] | None = None) -> Reply:
        """A call of this session."""
        return await self.request("POST", f"/sessions/{self.session_id}/{name}", message)

    async def heartbeat(self) -> Reply:
        """Keep the leases."""
        return await self.call("heartbeat", self.status)

    async def leave(self) -> Reply:
        """End the session."""
        return await self.request("DELETE", f"/sessions/{self.session_id}")

    async def claim(self, n: int = 1, wait_ms: int = 5_000, *, seq: int = 0) -> list[dict[str, Any]]:
        """Claim ``n`` jobs, with the next number unless another one is given, until some are there."""
        self.seq = seq or self.seq + 1
        claim = {
            "seq": self.seq,
            "turn": self.turn,
            "n": n,
            "pools": [{"pool": self.model, "lanes": LANES}],
        }
        message = {"shard": self.shard, "after": self.after, "wait_ms": wait_ms, "claim": claim}
        reply = await self.call("claim", message)
        if reply.status != 200:
            raise Broken(f"a claim is answered {reply.status} {reply.code}")
        for told in reply.message.get("messages", ()):
            self.after = told["id"]
        jobs: list[dict[str, Any]] = reply.message["claimed"]["jobs"]
        self.turn += len(jobs)
        return jobs

    async def next_job(self, tries: int = 5) -> dict[str, Any]:
        """The next job, waited for."""
        for _ in range(tries):
            if jobs := await self.claim():
                return jobs[0]
        raise Broken("a request was sent, and its job is not claimed within 25 s")

    async def messages(self, wait_ms: int = 5_000) -> list[dict[str, Any]]:
        """The next control messages."""
        reply = await self.call("claim", {"shard": self.shard, "after": self.after, "wait_ms": wait_ms})
        if reply.status != 200:
            raise Broken(f"a call for messages is answered {reply.status} {reply.code}")
        told: list[dict[str, Any]] = reply.message.get("messages", [])
        if told:
            self.after = told[-1]["id"]
        return told

    async def output(self, lease: str, seq: int, *data: str, head: bool | None = None) -> str:
        """Send pieces of a stream; what they are answered. ``head``: with piece 0 unless said otherwise."""
        part: dict[str, Any] = {"lease": lease, "seq": seq, "data": list(data)}
        if head if head is not None else seq == 0:
            part["head"] = {"status": 200, "content_type": "text/event-stream"}
        return _only(await self.call("output", {"attempts": [part]}))

    async def settle(self, lease: str, *data: str, seq: int = 0, stream: bool = False, **fields: Any) -> str:
        """End an attempt; what it is answered."""
        end: dict[str, Any] = {"lease": lease, "seq": seq, "data": list(data), "outcome": "done", **fields}
        if seq == 0:
            kind = "text/event-stream" if stream else "application/json"
            end["head"] = {"status": 200, "content_type": kind}
        return _only(await self.call("settle", {"attempts": [end]}))

    async def release(self, lease: str, kind: str = "handed_back") -> str:
        """End an attempt without an answer; what it is answered."""
        part = {"lease": lease, "kind": kind, "reason": "the rule says so"}
        return _only(await self.call("release", {"attempts": [part]}))

    async def request(
        self, method: str, path: str, message: Mapping[str, Any] | bytes | None = None, **headers: str
    ) -> Reply:
        """Any call. ``message``: bytes are sent as they are."""
        body = message if isinstance(message, bytes) or message is None else orjson.dumps(message)
        about = {"content-type": "application/json"} if body is not None else {}
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._http.request(
            method, self._url + path, data=body, headers={**self._headers, **about, **more}
        ) as answer:
            content = await answer.read()
            try:
                found = orjson.loads(content) if content else {}
            except orjson.JSONDecodeError:
                found = {"raw": content}
            return Reply(answer.status, found)


def _only(reply: Reply) -> str:
    if reply.status != 200:
        return f"{reply.status} {reply.code}"
    return str(reply.message["answers"][0])

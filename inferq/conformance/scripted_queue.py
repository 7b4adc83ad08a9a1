"""The queue behind the scripted Router: jobs that a rule makes, and everything that the worker said of them."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from queue_schemas.worker_protocol.messages import Claim, ClaimCall
from queue_schemas.worker_protocol.output import Head, Output, Release, Settle

MODEL = "model-under-test"
CHAT = "/v1/chat/completions"


@dataclass
class Attempt:
    """One run of a job: what came of it so far, and how it ended."""

    lease: str
    job: Job
    number: int
    attempt_id: str
    pieces: dict[int, bytes] = field(default_factory=dict)
    arrived_at: list[float] = field(default_factory=list)
    """When its calls of output came (s of the event loop)."""
    heads: list[Head] = field(default_factory=list)
    settles: list[Settle] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    answer: str = "ok"
    """What its output is answered."""

    @property
    def output(self) -> bytes:
        """Its answer, as far as it came without a gap."""
        parts: list[bytes] = []
        while len(parts) in self.pieces:
            parts.append(self.pieces[len(parts)])
        return b"".join(parts)

    @property
    def has_gap(self) -> bool:
        """Whether a piece is missing between others."""
        return len(self.pieces) != max(self.pieces, default=-1) + 1

    @property
    def ended(self) -> bool:
        """Whether it was settled or released."""
        return bool(self.settles or self.releases)


@dataclass
class Job:
    """A job that a rule puts on the queue."""

    body: bytes
    path: str = CHAT
    stream: bool = False
    content_type: str = "application/json"
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of what the worker is given."""
    first_attempt: int = 1
    job_id: str = field(default_factory=lambda: f"0-{secrets.token_hex(16)}")
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def last(self) -> Attempt:
        """Its newest attempt."""
        return self.attempts[-1]


def chat(content: str, *, stream: bool = False, **fields: Any) -> Job:
    """A chat with one message: what the scripted engine does with it says ``content``."""
    request = {"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": content}]}
    return Job(json.dumps(request).encode(), stream=stream, fields=fields)


class ScriptedQueue:
    """One shard with one worker. ``changed`` is set at everything that the worker says."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.waiting: list[Job] = []
        self.jobs: list[Job] = []
        self.messages: list[dict[str, Any]] = []
        """All control messages so far; the id of each is its place, from 1."""
        self.claims: list[Claim] = []
        self.by_lease: dict[str, Attempt] = {}
        self.parked = False
        """Whether the last claim gave less than it asked for: then new work is told."""
        self._answered: tuple[int, list[Attempt]] = (0, [])

    def reset_session(self) -> None:
        """Another session: its claims and messages begin anew."""
        self.messages.clear()
        self.claims.clear()
        self.parked = False
        self._answered = (0, [])

    def put(self, *jobs: Job) -> None:
        """New work; a worker that waits is woken."""
        self.waiting += jobs
        self.jobs += jobs
        if self.parked:
            self.tell("wake")
        self.changed.set()

    def tell(self, kind: str, **fields: Any) -> None:
        """A control message."""
        self.messages.append({"id": f"{len(self.messages) + 1}-0", "kind": kind, **fields})
        self.changed.set()

    def abort(self, job: Job) -> None:
        """The client of ``job`` has gone."""
        self.tell("abort", job_id=job.job_id, reason="its client disconnected")

    def begin(self, job: Job) -> Attempt:
        """A new attempt of ``job``."""
        attempt = Attempt(
            secrets.token_urlsafe(48), job, job.first_attempt + len(job.attempts), secrets.token_hex(6) + "0"
        )
        job.attempts.append(attempt)
        self.by_lease[attempt.lease] = attempt
        return attempt

    def claim(self, claim: Claim) -> list[Attempt]:
        """What a claim gives; the same again for the same number."""
        self.claims.append(claim)
        if claim.seq == self._answered[0]:
            return self._answered[1]
        taken, self.waiting = self.waiting[: claim.n], self.waiting[claim.n :]
        self._answered = (claim.seq, [self.begin(job) for job in taken])
        self.parked = len(taken) < claim.n
        return self._answered[1]

    def has_news(self, call: ClaimCall) -> bool:
        """Whether a held call has something to answer."""
        return len(self.messages) > _place(call.after)

    def news(self, call: ClaimCall) -> Sequence[dict[str, Any]]:
        """The messages behind those that the worker has read."""
        return self.messages[_place(call.after) :]

    def take_output(self, output: Output, now: float) -> str:
        """Pieces of an attempt; what they are answered."""
        attempt = self.by_lease.get(output.lease)
        if attempt is None:
            return "fenced"
        if attempt.answer == "ok":
            self._keep(attempt, output, now)
        return attempt.answer

    def settle(self, end: Settle, now: float) -> str:
        """The end of an attempt with an answer."""
        attempt = self.by_lease.get(end.lease)
        if attempt is None or attempt.answer == "fenced":
            return "fenced"
        if attempt.ended:
            return "duplicate"
        self._keep(attempt, end, now)
        attempt.settles.append(end)
        return "ok"

    def release(self, end: Release) -> str:
        """The end of an attempt without one. Its job does not run again unless the rule says so."""
        attempt = self.by_lease.get(end.lease)
        if attempt is None or attempt.answer == "fenced":
            return "fenced"
        if attempt.ended:
            return "duplicate"
        attempt.releases.append(end)
        return "ok"

    @staticmethod
    def _keep(attempt: Attempt, output: Output, now: float) -> None:
        attempt.arrived_at.append(now)
        if output.head is not None:
            attempt.heads.append(output.head)
        for n, piece in enumerate(output.data):
            attempt.pieces.setdefault(output.seq + n, piece)


def given(attempt: Attempt) -> dict[str, Any]:
    """The attempt as the worker gets it."""
    job = attempt.job
    return {
        "lease": attempt.lease,
        "job_id": job.job_id,
        "epoch": attempt.number,
        "attempt_id": attempt.attempt_id,
        "attempt": attempt.number,
        "max_attempts": 3,
        "model": MODEL,
        "path": job.path,
        "body": job.body,
        "content_type": job.content_type,
        "headers": {},
        "stream": job.stream,
        "lane": "interactive",
        "on_loss": "continue",
        "remaining_ms": 600_000,
        "waited_ms": 1,
        "request_id": f"req_{job.job_id[-8:]}",
        "cost_estimate": 100,
        "a_field_of_a_later_version": True,
        **job.fields,
    }


def _place(after: str) -> int:
    return int(after.partition("-")[0])

"""Leases as workers hold them over HTTP: strings that any Router can check, and nobody else can make.

A token says which attempt it is of, of which session, and where its output goes, with a signature (HMAC-SHA-256, cut to
128 bits) by a secret that all Routers share. So a Router need not remember what it gave out, and a worker can go on at
another one; and no worker can speak for an attempt that it was not given.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence

from queue_schemas import BadMessage, Job, JobId, Lease, Pool, SessionId, codec, shard_of_job
from queue_schemas.frames import FramePacker
from queue_schemas.worker_protocol.jobs import NOBODY

SECRET_BYTES = 32
_SIGNATURE_BYTES = 16
_MAX_REMEMBERED = 20_000


class HeldLease:
    """A lease that a token was checked to be of. ``lease.job`` has only what ends an attempt and carries its output.

    ``body_bytes`` is the size of the request; ``sent_bytes`` of its answer have come through this Router, without what
    came again."""

    __slots__ = ("_first", "_next", "body_bytes", "lease", "packer", "sent_bytes", "session_id", "shard")

    def __init__(self, session_id: SessionId, lease: Lease, body_bytes: int) -> None:
        self.session_id = session_id
        self.lease = lease
        self.body_bytes = body_bytes
        self.shard = shard_of_job(lease.job.id)
        self.packer = FramePacker(lease.job.id, lease.epoch, lease.attempt_id)
        self.sent_bytes = 0
        self._first = self._next = 0
        """The pieces that were counted last, without a gap."""

    @property
    def seen_whole(self) -> bool:
        """Whether all that was sent came through this Router."""
        return self._first == 0

    def count(self, seq: int, pieces: Sequence[bytes]) -> None:
        """``pieces``, numbered from ``seq``, were sent."""
        after = seq + len(pieces)
        self.sent_bytes += sum(
            len(piece) for number, piece in enumerate(pieces, seq) if not self._first <= number < self._next
        )
        if seq <= self._next and after >= self._first:
            self._first, self._next = min(self._first, seq), max(self._next, after)
        else:
            self._first, self._next = seq, after


class LeaseTokens:
    """Makes and reads tokens. ``secrets`` are those that are accepted; the first one signs."""

    def __init__(self) -> None:
        self.secrets: tuple[bytes, ...] = ()
        self._known: dict[str, HeldLease] = {}

    def use(self, secret: bytes) -> None:
        """Sign with ``secret`` from now on. What the one before has signed stays valid."""
        if self.secrets[:1] != (secret,):
            self.secrets = (secret, *self.secrets[:1])

    def issue(self, session_id: SessionId, lease: Lease) -> str:
        """The token of ``lease``, which ``session_id`` holds: the same one each time."""
        job = lease.job
        payload = codec.encode(
            [
                session_id,
                job.id,
                lease.epoch,
                lease.attempt_id,
                job.model,
                "" if job.persisted else job.reply_to,
                job.persisted,
                len(job.body),
                job.ttl_ms,
            ]
        )
        return _text(_signature(self.secrets[0], payload) + payload)

    def read(self, token: str, session_id: SessionId) -> HeldLease | None:
        """What ``token`` stands for; None if no Router has made it, or not for ``session_id``."""
        held = self._known.get(token)
        if held is None:
            held = self._checked(token)
            if held is None:
                return None
            if len(self._known) >= _MAX_REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[token] = held
        return held if held.session_id == session_id else None

    def forget(self, token: str) -> None:
        """Its attempt is over."""
        self._known.pop(token, None)

    def _checked(self, token: str) -> HeldLease | None:
        try:
            signed = base64.b64decode(token, altchars=b"-_", validate=True)
            if _text(signed) != token:  # other bits at its end: the same lease by another name
                return None
            signature, payload = signed[:_SIGNATURE_BYTES], signed[_SIGNATURE_BYTES:]
            if not any(hmac.compare_digest(signature, _signature(secret, payload)) for secret in self.secrets):
                return None
            session_id, job_id, epoch, attempt_id, model, reply_to, persisted, body_bytes, ttl = codec.decode(payload)
        except (binascii.Error, ValueError, BadMessage):
            return None
        job = Job(
            id=JobId(job_id),
            tenant=NOBODY,
            model=Pool(model),
            path="",
            body=b"",
            persisted=persisted,
            reply_to=reply_to,
            ttl_ms=ttl,
        )
        return HeldLease(SessionId(session_id), Lease(job, epoch, attempt_id, 1, ttl, 0), body_bytes)


def _text(signed: bytes) -> str:
    return base64.urlsafe_b64encode(signed).decode()


def _signature(secret: bytes, payload: bytes) -> bytes:
    return hmac.digest(secret, payload, "sha256")[:_SIGNATURE_BYTES]

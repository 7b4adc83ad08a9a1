"""An attempt's calls over HTTP: what :class:`broker.Attempts` is over Redis. Concurrent calls of a kind are one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from broker import Undelivered
from broker.batching import MAX_BATCH_BYTES, MAX_BATCH_ITEMS, Batcher
from queue_schemas import CONTINUED, HEAD, BadRequest, Frame, Job, Lease, Outcome, Settled, unpack_frames
from queue_schemas.worker_protocol.fields import MAX_BATCH
from queue_schemas.worker_protocol.output import (
    MAX_CONTENT_TYPE_LENGTH,
    MAX_PIECES,
    MAX_REASON_LENGTH,
    MAX_RELEASES,
    Answer,
    Answers,
)
from telemetry import get_logger

from .calls import RouterCalls
from .held_leases import HeldLeases

PIECE_BYTES = 4 << 20
"""Longer pieces are cut: a Router reads a call whole."""
_OVERHEAD_BYTES = 512
_UNDELIVERED = {"gone": Undelivered.GONE, "fenced": Undelivered.GONE, "full": Undelivered.FULL}

_Message = dict[str, Any]

log = get_logger(__name__)

assert MAX_BATCH_ITEMS <= MAX_BATCH  # noqa: S101 - a batch is a call
assert MAX_BATCH_BYTES <= PIECE_BYTES  # noqa: S101


class HttpAttempts:
    """The calls of the attempts that a worker runs, each named by its lease."""

    def __init__(self, calls: RouterCalls, held: HeldLeases) -> None:
        self._calls = calls
        self._held = held
        self._outputs = Batcher(self._send_outputs, _size)
        self._settles = Batcher(lambda items: self._each("settle", items), _size)
        self._releases = Batcher(lambda items: self._each("release", items), _size)

    async def publish(self, shard: int, frames: Mapping[str, bytes]) -> dict[str, Undelivered]:
        """As :meth:`broker.Attempts.publish`; who is sent to is named by the lease."""
        outputs = {to: list(_outputs(to, unpack_frames(packed))) for to, packed in frames.items()}
        futures = {to: [self._outputs.submit(output) for output in each] for to, each in outputs.items()}
        await asyncio.wait([future for each in futures.values() for future in each])  # whatever becomes of one
        answers = {to: [future.result() for future in each] for to, each in futures.items()}
        found = ((to, _UNDELIVERED.get(answer)) for to, each in answers.items() for answer in each)
        return {to: why for to, why in found if why is not None}

    async def append(self, lease: Lease, frames: bytes) -> Settled:
        """As :meth:`broker.Attempts.append`."""
        outputs = _outputs(lease.job.reply_to, unpack_frames(frames))
        answers = [await future for future in [self._outputs.submit(output) for output in outputs]]
        return next((Settled(answer) for answer in answers if answer != "ok"), Settled.OK)

    async def settle(
        self,
        lease: Lease,
        outcome: Outcome,
        frames: bytes = b"",
        *,
        used: int | None = None,
        run_ms: int | None = None,
    ) -> Settled:
        """As :meth:`broker.Attempts.settle`."""
        *before, last = _outputs(lease.job.reply_to, unpack_frames(frames)) if frames else [{}]
        for output in before:  # what is too large for one call
            answer = await self._outputs.submit(output)
            while answer == "full":
                await asyncio.sleep(_FULL_PAUSE_S)
                answer = await self._outputs.submit(output)
            if answer != "ok":
                return Settled(answer)
        end = {"lease": lease.job.reply_to, **last, "outcome": outcome.value, "used": used, "run_ms": run_ms}
        return Settled(await self._settles.submit({name: value for name, value in end.items() if value is not None}))

    async def release(self, lease: Lease, reason: str, *, counted: bool, avoid_ms: int | None = None) -> Settled:
        """As :meth:`broker.Attempts.release`."""
        kind = "spent" if counted else "handed_back"
        return await self._release(lease, kind, reason, {} if avoid_ms is None else {"avoid_ms": avoid_ms})

    async def release_yielded(self, lease: Lease, reason: str, following: Job | None = None) -> Settled:
        """As :meth:`broker.Attempts.release_yielded`."""
        return await self._release(lease, "yielded", reason, {} if following is None else {"said": following.prefix})

    async def decline_to_yield(self, lease: Lease, *, for_now: bool, region: str = "") -> None:
        """As :meth:`broker.Attempts.decline_to_yield`."""
        await self._post("decline", {"lease": lease.job.reply_to, "for_now": for_now, "region": region})

    async def report_crash(self, leases: Sequence[Lease], reason: str) -> list[Settled]:
        """As :meth:`broker.Attempts.report_crash`. Which job did it is found out among those of one call, so there is
        but one, for as many as a call may have."""
        ends = [_crashed(lease, reason) for lease in leases]
        parts = [ends[start : start + MAX_RELEASES] for start in range(0, len(ends), MAX_RELEASES)]
        return [Settled(answer) for part in parts for answer in await self._send("release", part)]

    async def clear_suspicion(self, lease: Lease) -> Settled:
        """As :meth:`broker.Attempts.clear_suspicion`."""
        await self._post("clear_suspicion", {"lease": lease.job.reply_to})
        return Settled.OK

    async def close(self) -> None:
        """Stop; calls under way are cancelled."""
        await asyncio.gather(self._outputs.close(), self._settles.close(), self._releases.close())

    async def _release(self, lease: Lease, kind: str, reason: str, more: _Message) -> Settled:
        end = {"lease": lease.job.reply_to, "kind": kind, "reason": reason[:MAX_REASON_LENGTH], **more}
        return Settled(await self._releases.submit(end))

    async def _post(self, path: str, message: _Message) -> None:
        await self._calls.send("POST", f"/sessions/{self._held.session_id}/{path}", message)

    async def _send_outputs(self, items: Sequence[_Message]) -> list[Answer | Exception]:
        """An attempt whose output no Router takes ends."""
        answers = await self._each("output", items)
        for place, answer in enumerate(answers):
            if isinstance(answer, BadRequest):
                log.error("output_refused", error=answer.message)
                answers[place] = "gone"
        return answers

    async def _each(self, path: str, items: Sequence[_Message]) -> list[Answer | Exception]:
        """An answer for each item. One that is refused costs the others nothing."""
        try:
            return [*await self._send(path, items)]
        except BadRequest as error:
            if len(items) == 1:
                return [error]
        return [answer for item in items for answer in await self._each(path, [item])]

    async def _send(self, path: str, items: Sequence[_Message]) -> list[Answer]:
        message = {"attempts": list(items)}
        return (await self._calls.ask(f"/sessions/{self._held.session_id}/{path}", message, Answers)).answers


_FULL_PAUSE_S = 0.25


def _crashed(lease: Lease, reason: str) -> _Message:
    return {"lease": lease.job.reply_to, "kind": "crashed", "reason": reason[:MAX_REASON_LENGTH]}


def _size(message: _Message) -> int:
    return sum(map(len, message.get("data", ()))) + _OVERHEAD_BYTES


def _outputs(token: str, frames: Sequence[Frame]) -> Iterator[_Message]:
    """Frames as messages of the protocol, none much larger than ``PIECE_BYTES``. One that is cut is an answer that is
    no stream: the only frame of its attempt."""
    if len(frames) == 1 and len(frames[0].data) > PIECE_BYTES:
        data = frames[0].data
        pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
        for n, piece in enumerate(pieces):
            yield {"lease": token, "seq": n, "data": [piece], **(_head(frames[0]) if not n else {})}
        return
    size = 0

    def call_of(numbered: tuple[int, Frame]) -> int:
        nonlocal size
        size += len(numbered[1].data)
        return max(size // PIECE_BYTES, numbered[0] // MAX_PIECES)

    for _, run in groupby(enumerate(frames), call_of):
        part = [frame for _, frame in run]
        yield {"lease": token, "seq": part[0].seq, "data": [frame.data for frame in part], **_head(part[0])}


def _head(frame: Frame) -> _Message:
    if not frame.flags & HEAD:
        return {}
    head: _Message = {"status": frame.status, "content_type": frame.content_type[:MAX_CONTENT_TYPE_LENGTH]}
    if frame.flags & CONTINUED:
        head["continued"] = True
    if frame.headers:
        head["headers"] = dict(frame.headers)
    return {"head": head}

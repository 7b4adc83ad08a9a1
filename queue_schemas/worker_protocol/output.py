"""What a worker sends of its attempts: pieces of their answers, and how they end."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..leases import Outcome
from .fields import MAX_BATCH, Count, Encoding, LeaseToken, Message, Milliseconds

MAX_SEQ = 2**31
MAX_PIECES = 4_096
MAX_REASON_LENGTH = 500
MAX_CONTENT_TYPE_LENGTH = 1_000
MAX_RELEASES = 4_096
"""Most attempts that one call releases: all that ran on an engine which crashed are in one."""

Answer = Literal["ok", "duplicate", "fenced", "gone", "full"]
"""What becomes of what an attempt sent.

``ok``: it was taken. ``duplicate``: the attempt has ended its job before, a repeat. ``fenced``: the attempt does not
own its job any more. ``gone``: the job, or who waited for it, is gone. ``full``: who waits does not read: send it again
in a while, and read the engine no further. After ``fenced`` and ``gone`` stop the attempt: nobody takes its output.
"""


class Head(Message):
    """How an answer begins."""

    status: int = Field(ge=200, le=599)
    content_type: str = Field(max_length=MAX_CONTENT_TYPE_LENGTH)
    continued: bool = Field(default=False, description="it goes on behind the job's prefix, rather than from the start")
    headers: dict[str, str] = Field(default_factory=dict, max_length=64)


class Output(Message):
    """Pieces of an attempt's answer, numbered without a gap from 0. A piece that was sent before is dropped, so
    whatever may not have arrived is sent again. Pieces of an event stream are whole events, with LF as line end."""

    lease: LeaseToken
    seq: int = Field(default=0, ge=0, le=MAX_SEQ, description="the number of the first piece")
    head: Head | None = Field(default=None, description="with piece 0")
    data: list[bytes] = Field(default_factory=list, max_length=MAX_PIECES)
    encoding: Encoding = Field(default="text", description="how data is written, in JSON")


class OutputCall(Message):
    """``POST /worker/v1/sessions/{session_id}/output``: what streams put out, of any number of attempts."""

    attempts: list[Output] = Field(max_length=MAX_BATCH)


class Settle(Output):
    """The end of an attempt that has an answer, with what of it was not sent: the last piece is its end."""

    outcome: Outcome = Field(description="failed: the answer is an error, of status 400 or above")
    used: Count | None = Field(
        default=None,
        description="what it cost: 1 for each prompt token, a tenth of that for a cached one, 2 for each output token",
    )
    run_ms: Milliseconds | None = Field(default=None, description="for how long it had its slot")


class SettleCall(Message):
    """``POST /worker/v1/sessions/{session_id}/settle``."""

    attempts: list[Settle] = Field(max_length=MAX_BATCH)


class Release(Message):
    """The end of an attempt that has no answer: the job runs again, ahead of new work."""

    lease: LeaseToken
    kind: Literal["handed_back", "spent", "crashed", "yielded"] = Field(
        description="handed_back: as if never started. spent: one of max_attempts is used up. crashed: its engine did, "
        "with all of this call that say so. yielded: it was asked to yield"
    )
    reason: str = Field(max_length=MAX_REASON_LENGTH, description="for people who read of a dead letter")
    avoid_ms: Milliseconds | None = Field(
        default=None, description="with spent: how long the job does not come back to this worker"
    )
    said: str | None = Field(
        default=None,
        description="with yielded, of a job that is no stream: what it said so far, behind which the next one goes on",
    )


class ReleaseCall(Message):
    """``POST /worker/v1/sessions/{session_id}/release``."""

    attempts: list[Release] = Field(max_length=MAX_RELEASES)


class Answers(Message):
    """One answer for each attempt of the call, in its order."""

    answers: list[Answer]

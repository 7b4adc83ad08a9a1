"""The worker protocol's calls about a session: join, renew, claim, reconcile, and what they are answered."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from ..control import ControlKind
from ..fleet.messages import MAX_MODELS, MAX_SLOTS, MAX_VERSION, Registration, RegistrationAnswer
from ..ids import MAX_NAME_BYTES
from ..lanes import LANES, Lane
from .fields import Count, LeaseToken, Message, Region, Shard
from .jobs import LeasedJob

MAX_WAIT_MS = 30_000
MAX_CLAIM = 32
"""Most jobs in one claim: their bodies come in one answer."""
MAX_POSITION_LENGTH = 41
_MAX_POSITION = 2**63
"""Neither part of a stream's position comes near it; behind the greatest that Redis has, nothing could be written."""


def _check_position(position: str) -> str:
    if any(int(part) >= _MAX_POSITION for part in position.split("-")):
        raise ValueError("no control message has such an id: send that of the last one that was read")
    return position


_Position = Annotated[
    str,
    Field(
        max_length=MAX_POSITION_LENGTH,
        pattern=r"^[0-9]{1,20}(-[0-9]{1,20})?$",
        description="the id of the last control message that was read; 0 at first",
    ),
    AfterValidator(_check_position),
]


class Join(Registration):
    """``POST /worker/v1/sessions``: a worker joins. ``url`` is ignored: nobody calls it."""

    again: bool = Field(
        default=False,
        description="the session has joined before and registers again, as the Manager forgot it: its leases stand",
    )


class Joined(RegistrationAnswer):
    """The answer to a join. It names no broker."""

    broker_url: str = ""


class ClaimedPool(Message):
    """A model whose jobs are claimed, and from which lanes."""

    pool: Annotated[str, Field(min_length=1, max_length=MAX_NAME_BYTES)]
    lanes: list[Lane] = Field(default_factory=lambda: list(LANES), max_length=len(LANES))


class Claim(Message):
    """Take up to ``n`` jobs. With fewer the worker is parked: it is told when there are more."""

    seq: int = Field(
        ge=1,
        le=MAX_VERSION,
        description="rises with each new claim of the session on the shard; a claim that was not answered is repeated "
        "with its own, and gives the same jobs",
    )
    n: int = Field(ge=0, le=MAX_CLAIM, description="free slots to fill; 0 takes none, and unparks the worker")
    pools: list[ClaimedPool] = Field(max_length=MAX_MODELS, description="as assigned; all of them on this shard")
    region: Region = ""
    turn: int = Field(
        default=0,
        ge=0,
        le=MAX_VERSION,
        description="jobs claimed so far on the shard: it decides which lane goes first",
    )
    offer: int = Field(
        default=0,
        ge=0,
        le=MAX_SLOTS,
        description="slots for jobs that are handed over while the worker is parked, without another claim; what this "
        "claim gives counts among them",
    )
    received: Count = Field(default=0, description="jobs handed over so far on the shard, of this session")
    cache: Count = Field(default=0, description="rises as the engine's prefix cache forgets what it served")
    slots: int = Field(default=0, ge=0, le=MAX_SLOTS, description="all slots, busy ones too")
    capacity: int = Field(default=0, ge=0, le=MAX_SLOTS, description="the most slots that the worker may come to have")


class ClaimCall(Message):
    """``POST /worker/v1/sessions/{session_id}/claim``: take jobs, and read what the queue has to say. With ``wait_ms``
    an answer that would be empty is held until there is something."""

    shard: Shard = 0
    after: _Position = "0"
    wait_ms: int = Field(default=0, ge=0, le=MAX_WAIT_MS)
    claim: Claim | None = None


class Claimed(Message):
    """What a claim gave."""

    jobs: list[LeasedJob]
    parked: bool = Field(description="whether there were fewer than asked for: the worker is told when there are more")
    handed_over: Count = Field(description="jobs handed over so far to this session on the shard")
    offered: Count = Field(description="jobs that may still be handed over without a claim: their slots are spoken for")


class ControlMessage(Message):
    """What the queue tells a worker. ``job``: with ``job`` (null: it could not be read, and has used up a slot of the
    offer); ``job_id``: with ``abort`` and ``yield``; ``attempt_id``: with ``yield``; ``reason``: with ``abort``."""

    id: _Position
    kind: str = Field(description="one of " + ", ".join(ControlKind) + "; others are for newer workers")
    job: LeasedJob | None = None
    job_id: str = ""
    attempt_id: str = ""
    reason: str = ""


class ClaimAnswer(Message):
    """The answer to a claim. Act on ``messages`` in their order."""

    claimed: Claimed | None = None
    messages: list[ControlMessage] = Field(default_factory=list)


class Reconcile(Message):
    """``POST /worker/v1/sessions/{session_id}/reconcile``: all that the session runs on a shard, after the queue may
    have lost what it was told last (a call to this path or a claim failed)."""

    shard: Shard = 0
    after: _Position = "0"
    seq: int = Field(ge=0, le=MAX_VERSION, description="that of the last claim on the shard; 0 before the first")
    leases: list[LeaseToken] = Field(max_length=MAX_SLOTS)


class Reconciled(Message):
    """Of the leases that were named, those that the session holds no more: stop these attempts, nobody takes their
    output."""

    lost: list[LeaseToken]


class ServedElsewhere(Message):
    """``GET /worker/v1/sessions/{session_id}/elsewhere?model=``: whether another worker serves a model."""

    served: bool


class LeaseCall(Message):
    """A call about one lease: ``.../clear_suspicion`` (a suspect has put out more than before its engine crashed) and
    ``.../delivered`` (what earlier attempts of a persisted stream said)."""

    lease: LeaseToken


class Decline(Message):
    """``POST /worker/v1/sessions/{session_id}/decline``: an attempt that was asked to yield runs on."""

    lease: LeaseToken
    region: Region = ""
    for_now: bool = Field(description="it may be asked again; else it never yields")

"""Requests of a simulation: what a trace says of one, and what becomes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from queue_schemas.lanes import DEFAULT_BAND, Lane
from scheduling.cost import USUAL_OUTPUT, Usage, cost_of

if TYPE_CHECKING:
    from .fleet import Worker

DEFAULT_TENANT = "default"


class TraceRequest(NamedTuple):
    """One line of a trace. ``at_s`` counts from the trace's beginning; ``prompt_tokens`` and ``output_tokens`` are at
    least 1. ``blocks`` are ids of the prompt's leading blocks of ``Trace.block_tokens`` tokens: equal ids at equal
    places mean the same text up to there."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    tenant: str = DEFAULT_TENANT
    lane: Lane = Lane.INTERACTIVE
    band: int = DEFAULT_BAND


class Request:
    """A request in the simulation. Times are in seconds of the simulation's clock, negative while not known.

    ``generated`` are the output tokens that it has, on whichever worker; ``cached`` the prompt tokens that the prefix
    cache of its first engine held; ``redone`` the tokens that were computed again after an attempt was interrupted.
    ``digests`` are those of its prefix (:mod:`scheduling.affinity`). It has waited since ``queued_at``, an engine
    began it first at ``started_at``, and its latest attempt ``began_at``. It may yield ``yields_left`` times more. A
    tenant is to be charged ``charge`` for it, and was ``charged`` for an attempt; None: for none. ``cost`` is what it
    is thought to cost (:mod:`scheduling.cost`). Its wait was ``predicted_ms``, None if it was not, and ``waited_ms``.
    """

    __slots__ = (
        "arrived_at", "band", "began_at", "blocks", "cached", "charge", "charged", "cost", "digests", "first_at",
        "generated", "lane", "number", "output_tokens", "predicted_ms", "prompt_tokens", "queued_at", "redone",
        "started_at", "tenant", "waited_ms", "worker", "yields_left",
    )  # fmt: skip

    def __init__(self, number: int, line: TraceRequest, arrived_at: float) -> None:
        self.number = number
        self.arrived_at = arrived_at
        _, self.prompt_tokens, self.output_tokens, self.blocks, self.tenant, self.lane, self.band = line
        self.digests = ""
        self.cost = cost_of(Usage(self.prompt_tokens, USUAL_OUTPUT))
        self.predicted_ms: int | None = None
        self.waited_ms = 0
        self.charge = 0.0
        self.charged: float | None = None
        self.queued_at = arrived_at
        self.started_at = -1.0
        self.began_at = -1.0
        self.first_at = -1.0
        self.generated = 0
        self.cached = 0
        self.redone = 0
        self.yields_left = 0
        self.worker: Worker | None = None

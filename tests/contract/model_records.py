"""Records of the reference model, and the ``Snapshot`` in which model and queue are compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from queue_schemas import Frame, Job, Lane, Marker, State
from scheduling.arrivals import Arrivals
from scheduling.fairness import Band
from scheduling.prediction import Rate

SUSPECT = 2
"""A crash of the engine makes a suspect at once, the death of a worker at the second time."""


class Disagreement(AssertionError):
    """The queue did what it may not do."""


def require(truth: object, sentence: str) -> None:
    """Disagree, in a sentence, unless ``truth``."""
    if not truth:
        raise Disagreement(sentence)


class Place(NamedTuple):
    """Where jobs wait and run."""

    pool: str
    lane: Lane


class Line(NamedTuple):
    """One line of waiting jobs: fresh ones of a tenant in a band, or those that wait again."""

    kind: str
    place: Place
    band: int = 0
    tenant: str = ""


@dataclass
class Live:
    """A job that has not ended."""

    job: Job
    deadline: int
    enqueued_at: int
    line: Line | None
    state: State = State.QUEUED
    epoch: int = 1
    attempts: int = 0
    attempt_id: str = ""
    owner: str = ""
    handed_back: tuple[int, str] | None = None
    avoid: tuple[str, int] = ("", 0)
    suspicion: int = 0
    spared: bool = False
    cleared: bool = False
    held_as_suspect: bool = False
    ask_at: int = 0
    may_yield: int = 0
    """How often it may yield still."""
    is_yieldable: bool = False
    """Whether its attempt may be asked to yield."""
    started_at: int = 0
    asked_at: int | None = None
    """When its attempt was asked to yield."""
    predicted_ms: int | None = None
    """How long it was thought to wait as it came."""
    charged: float | None = None
    """What its tenant was charged for the attempt that runs."""
    is_unread: bool = False
    """It was handed to a worker that has not read of it."""
    listeners: set[str] = field(default_factory=set)
    """Routers that are sent what a persisted job says."""
    output: list[tuple[int, int, int]] = field(default_factory=list)
    """What is kept of a persisted job's answer: epoch, seq and bytes of each frame."""

    @property
    def place(self) -> Place:
        return Place(self.job.model, self.job.lane)

    @property
    def size(self) -> int:
        return len(self.job.pack())

    @property
    def is_suspect(self) -> bool:
        return self.suspicion >= SUSPECT

    @property
    def is_continued(self) -> bool:
        return self.job.stream and self.job.on_loss == "continue" and not self.job.persisted and bool(self.job.reply_to)


class Tombstone(NamedTuple):
    """What is kept of a job that has ended. ``attempt_id`` is that of the attempt that ended it by its own word."""

    state: State
    epoch: int
    attempt_id: str = ""


@dataclass
class Kept:
    """What is kept of a persisted job that has ended, and until when."""

    job: Job
    output: list[tuple[int, int, int]]
    until: int


@dataclass
class Run:
    """One run of one worker, from its join on."""

    number: int = 1
    fenced: bool = False
    blames: bool = False
    """Whether a suspect was held when the reclaim began: then it did it."""
    seq: int = 0
    given: tuple[tuple[str, str], ...] = ()
    parked: bool = False
    """It claimed less than it asked for, and has not used up or withdrawn its offer since."""
    handed_over: int = 0
    offered: int = 0
    """Jobs that may be handed to it still."""
    cache: int = 0
    """The number of its engine's prefix cache."""
    slots: int = 0
    capacity: int = 0
    """The most slots that it may have."""

    @property
    def order(self) -> tuple[float, int]:
        """Where it stands among those that are handed work: by its load, then by what it offers."""
        slots = max(self.slots, self.offered)
        return (slots - self.offered) / max(self.capacity, slots, 1), -self.offered


class DeadLetter(NamedTuple):
    job_id: str
    cause: str
    worker: str
    attempts: int


@dataclass
class Effects:
    """What a call does besides answering. ``may_wake``: workers that may be told to claim without need."""

    news: list[tuple[str, Frame | Marker]] = field(default_factory=list)
    aborts: Counter[tuple[str, str]] = field(default_factory=Counter)
    wakes: Counter[str] = field(default_factory=Counter)
    may_wake: set[str] = field(default_factory=set)
    yields: list[tuple[str, str]] = field(default_factory=list)
    """Workers and the attempts that they were asked to have yield."""
    handed: list[tuple[str, str]] = field(default_factory=list)
    """Workers and the attempts that were handed to them."""


@dataclass
class Snapshot:
    """The state of a queue that a comparison covers."""

    records: dict[str, tuple[object, ...]]
    lines: dict[Line, list[str]]
    leases: dict[str, dict[str, int]]
    budgets: dict[str, int]
    waiting: dict[Place, int]
    costs: dict[tuple[Place, int], int]
    """What waits, by its cost."""
    rates: dict[Place, Rate]
    arrivals: dict[Place, Arrivals]
    looked_at: int
    """When the sweep looked last at how many jobs had come; 0 before."""
    bands: dict[tuple[Place, int], Band]
    """Where the tenants of each band stand."""
    leased: dict[Place, int]
    totals: dict[tuple[str, Lane, str], int]
    turns: dict[Place, int]
    deadlines: dict[str, int]
    lost: dict[str, int]
    parked: dict[Place, dict[str, int]]
    offers: dict[Place, dict[str, int]]
    yieldable: dict[str, dict[str, int]]
    """By pool: running jobs that may yield, by their start or minus the time at which they were asked to."""
    renewals: dict[str, int]
    dead: list[DeadLetter]
    listening: set[str]
    listeners: dict[str, set[str]]
    outputs: dict[str, list[tuple[int, int]]]
    kept: dict[str, int]
    keys: dict[str, str]
    warm: dict[str, tuple[str, tuple[str, ...]]]
    waits: dict[Place, int]
    affinities: dict[tuple[str, Lane, str], int]

"""The control plane's messages, as JSON over HTTP under ``/fabric/v1``.

A Router and a Manager serve the same paths; a worker needs to reach one of them. Unknown fields are ignored, so that
two versions of the fabric can talk during a rolling upgrade.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..errors import BadMessage
from ..ids import (
    MAX_NAME_BYTES,
    MAX_REGION_LENGTH,
    SESSION_ID_PATTERN,
    WORKER_ID_PATTERN,
    check_name,
    check_region,
    check_session_id,
    check_worker_id,
)
from ..lanes import LANES, Lane
from .adapters import AdapterBase, AdapterFailures, AdapterNames, AdapterRoom, AdapterSet, AssignedAdapters
from .fields import checked, is_empty
from .model_cards import bounded_cards

FABRIC_PREFIX = "/fabric/v1"
JOIN_TOKEN_HEADER = "x-inferq-join-token"  # noqa: S105 - the name of a header
RAY_NAMESPACE = "inferq"
RAY_MANAGER = "manager"
"""Where in a Ray cluster the Manager is found: an actor of this name in that namespace."""
MAX_MODELS = 1024
"""Most models (adapters included) that one worker may serve."""
MAX_LOADABLE = 256
"""Most models of which a worker's engine may load one."""
MAX_TERM = 2**40
"""Terms count Managers; ``act_as_manager.lua`` has the same limit."""
MAX_VERSION = 2**53
"""Whole numbers up to here are exact in every JSON reader."""
MAX_SHARDS = 10_000
MAX_SLOTS = 65_536
MAX_COUNT = 2**31
MAX_MS = 2**53
MAX_INTERVAL_MS = 24 * 3600 * 1000
MAX_WORKERS = 100_000
MAX_URL_LENGTH = 2_000
MAX_DETAIL_LENGTH = 2_000


def check_worker_url(value: str) -> str:
    """``value`` if it may be where a worker is reached: ``http://host:port`` or https, with a path if need be, else
    ``BadMessage``. The Manager asks there, and everybody may see it: no credentials, no query."""
    wrong = BadMessage("a worker's url must be written like http://host:port: no user, password, query or fragment")
    if not value.isascii() or not value.isprintable() or any(sign in value for sign in " \\?#@"):
        raise wrong
    try:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:
            raise wrong
    except ValueError:
        raise wrong from None
    return value


def _check_model(value: str) -> str:
    return check_name(value, "model")


_WorkerName = Annotated[str, checked(check_worker_id), Field(json_schema_extra={"pattern": f"^{WORKER_ID_PATTERN}$"})]
_Run = Annotated[str, checked(check_session_id), Field(json_schema_extra={"pattern": f"^{SESSION_ID_PATTERN}$"})]
_Model = Annotated[str, checked(_check_model), Field(json_schema_extra={"minLength": 1, "maxLength": MAX_NAME_BYTES})]
_Cards = Annotated[
    dict[str, dict[str, Any]],
    BeforeValidator(bounded_cards),
    Field(description="what its engine says of each model: max_model_len, root, parent, ..."),
]
_Models = Annotated[list[_Model], Field(max_length=MAX_MODELS)]
_MaybeModel = Annotated[str, checked(lambda value: _check_model(value) if value else value)]
_Loadable = Annotated[
    list[_Model],
    Field(
        max_length=MAX_LOADABLE,
        exclude_if=is_empty,
        description="models of which its engine can serve one at a time, by restarting; empty: it serves what it does",
    ),
]
_Region = Annotated[str, checked(check_region)]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class EngineState(StrEnum):
    """The state of a worker's engine, as the worker reports it."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"


class WorkerState(StrEnum):
    """How the Manager sees a worker. The dead are forgotten, so they have no state."""

    ACTIVE = "active"
    UNRESPONSIVE = "unresponsive"
    """Its heartbeats stopped: it gets no new assignment, its running work goes on."""
    DRAINING = "draining"


class WorkerStatus(_Message):
    """What a worker says of itself, at registration and in every heartbeat."""

    session_id: _Run
    models: _Models = Field(default_factory=list)
    cards: _Cards = Field(default_factory=dict)
    slots: int = Field(ge=0, le=MAX_SLOTS, description="jobs it can run at once")
    running: int = Field(default=0, ge=0, le=MAX_COUNT, description="jobs it runs now")
    engine: EngineState = EngineState.STARTING
    engine_detail: str = Field(default="", max_length=MAX_DETAIL_LENGTH)
    broker_ok: bool = Field(default=True, description="whether it reaches Redis")
    draining: bool = False
    term: int = Field(default=0, ge=0, le=MAX_TERM, description="the term of the assignment that it follows; 0: none")
    loaded: _MaybeModel = Field(
        default="",
        max_length=MAX_NAME_BYTES,
        exclude_if=is_empty,
        description="of the models that it could load, the one that its engine serves or starts with",
    )
    adapter_room: AdapterRoom = 0
    adapter_failures: AdapterFailures = Field(default_factory=dict)


class Registration(WorkerStatus):
    """``POST /fabric/v1/workers``."""

    worker_id: _WorkerName
    url: Annotated[str, checked(check_worker_url)] | None = Field(
        default=None, max_length=MAX_URL_LENGTH, description="where the worker's HTTP service may be reached"
    )
    version: str = Field(default="", max_length=200)
    region: _Region = Field(default="", max_length=MAX_REGION_LENGTH)
    loadable: _Loadable = Field(default_factory=list)
    adapters: AdapterNames = Field(default_factory=list)
    adapter_base: AdapterBase = ""


class PoolAssignment(_Message):
    """A worker pulls ``lanes`` of ``pool`` on ``shard``."""

    pool: _Model
    shard: int = Field(ge=0, lt=MAX_SHARDS)
    lanes: list[Lane] = Field(default_factory=lambda: list(LANES), max_length=len(LANES))


class Assignment(_Message):
    """What one worker pulls, and loads. ``(term, version)`` orders assignments; a lower one is ignored."""

    term: int = Field(ge=0, le=MAX_TERM)
    version: int = Field(ge=0, le=MAX_VERSION)
    pools: list[PoolAssignment] = Field(default_factory=list, max_length=MAX_MODELS)
    load: _MaybeModel = Field(
        default="",
        max_length=MAX_NAME_BYTES,
        exclude_if=is_empty,
        description="the model that its engine is to serve, of those it could load; empty: the one that it does",
    )
    adapters: AssignedAdapters = None

    @property
    def order(self) -> tuple[int, int]:
        return (self.term, self.version)


class RegistrationAnswer(_Message):
    """The answer to a registration: everything a worker needs to know."""

    broker_url: str = Field(
        max_length=MAX_URL_LENGTH,
        description="the broker's advertised address; without its password where the Manager has no join token",
    )
    shards: int = Field(ge=1, le=MAX_SHARDS)
    lease_ms: int = Field(
        ge=1, le=MAX_INTERVAL_MS, description="a worker whose renewal number stands still for so long has lost its jobs"
    )
    heartbeat_interval_ms: int = Field(ge=1, le=MAX_INTERVAL_MS, description="how often to send a heartbeat")
    assignment: Assignment


class Heartbeat(WorkerStatus):
    """``POST /fabric/v1/workers/{worker_id}/heartbeat``."""


class HeartbeatAnswer(_Message):
    """The Manager's reply to a heartbeat: the worker's assignment, and whether it should drain."""

    assignment: Assignment
    drain: bool = False


class WorkerInfo(_Message):
    """One entry of ``GET /fabric/v1/workers``, and of the registry snapshot in Redis."""

    worker_id: _WorkerName
    session_id: _Run
    url: str | None = Field(default=None, max_length=MAX_URL_LENGTH)
    url_note: str = Field(
        default="", max_length=2 * MAX_DETAIL_LENGTH, description="what is wrong with the URL, if the Manager tried it"
    )
    url_verified: bool = Field(
        default=False,
        description="whether this very worker answered there: only then can its death be certain before its lease ends",
    )
    version: str = Field(default="", max_length=200)
    region: _Region = Field(default="", max_length=MAX_REGION_LENGTH)
    models: _Models = Field(default_factory=list)
    cards: _Cards = Field(default_factory=dict)
    slots: int = Field(default=0, ge=0, le=MAX_SLOTS)
    running: int = Field(default=0, ge=0, le=MAX_COUNT)
    engine: EngineState = EngineState.STARTING
    engine_detail: str = Field(default="", max_length=MAX_DETAIL_LENGTH)
    broker_ok: bool = True
    state: WorkerState = WorkerState.ACTIVE
    heartbeat_age_ms: int = Field(default=0, ge=0, le=MAX_MS)
    loaded: _MaybeModel = Field(default="", max_length=MAX_NAME_BYTES, exclude_if=is_empty)
    loadable: _Loadable = Field(default_factory=list)
    adapter_set: AdapterSet = ""
    adapter_base: AdapterBase = ""
    adapter_room: AdapterRoom = 0
    adapter_failures: AdapterFailures = Field(default_factory=dict)
    assignment: Assignment

    @property
    def is_swapping(self) -> bool:
        """Whether it was told to load another model and has not begun to: it claims nothing until it serves that."""
        return self.assignment.load not in ("", self.loaded)

    @property
    def is_present(self) -> bool:
        """Whether it is active and reaches the queue, so that it takes work as soon as its engine is ready."""
        return self.state is WorkerState.ACTIVE and self.broker_ok

    @property
    def takes_work(self) -> bool:
        """Whether jobs for its models will be claimed by it."""
        return self.is_present and self.engine is EngineState.READY and not self.is_swapping


class WorkerList(_Message):
    """``GET /fabric/v1/workers``: the registered workers, and the leading Manager with its term."""

    workers: list[WorkerInfo] = Field(max_length=MAX_WORKERS)
    manager: str = Field(default="", max_length=MAX_NAME_BYTES)
    term: int = Field(default=0, ge=0, le=MAX_TERM)


class BrokerAddress(_Message):
    """``GET /fabric/v1/broker``: where a Router finds the queue; without a join token to show, without its password."""

    broker_url: str = Field(max_length=MAX_URL_LENGTH)
    shards: int = Field(ge=1, le=MAX_SHARDS)


class LaneDepth(_Message):
    """Only ever an answer: what the queue counts is told as it is."""

    waiting: int = 0
    leased: int = 0
    oldest_age_ms: int = Field(default=0, description="how long the longest-waiting job had waited at the last sweep")
    deadline_ms: int | None = Field(
        default=None,
        description="until the earliest deadline of the jobs that are next of their tenants; null: none waits",
    )
    by_region: dict[str, int] = Field(
        default_factory=dict, description="of those waiting, the ones whose region's workers go first"
    )
    cost: int = Field(default=0, description="what those waiting are thought to cost, in units of one prompt token")
    ms_per_cost: float | None = Field(
        default=None, description="for how long a slot was taken for each unit, of late; null while unknown"
    )
    ms_per_job: float | None = Field(
        default=None, description="for how long a slot was taken by each job, of late; null while unknown"
    )
    arrivals_per_s: float | None = Field(
        default=None,
        description="jobs that came each second, over the last half minute or so; null while nothing waits or runs, "
        "and while nobody sweeps the queue",
    )
    predicted_wait_ms: int | None = Field(
        default=None,
        description="until a job starts that comes now and finds no free slot, behind all that waits; null: unknown",
    )


class PoolDepth(_Message):
    """``GET /fabric/v1/pools/{model}``: the queue of one model, for people and autoscalers."""

    model: str
    waiting: int = 0
    leased: int = 0
    outstanding: int = Field(default=0, description="waiting + leased")
    oldest_age_ms: int = 0
    workers: int = Field(default=0, description="workers that take work for it now")
    slots: int = 0
    replicas_wanted: int | None = Field(
        default=None, description="workers that its queue calls for now, as Routers count; for KEDA and HPA"
    )
    lanes: dict[Lane, LaneDepth] = Field(default_factory=dict)


class PoolList(_Message):
    """``GET /fabric/v1/pools``: the depth of every pool's queue."""

    pools: list[PoolDepth]


class AutoscalerClaim(_Message):
    """``POST /fabric/v1/autoscalers``: an autoscaler acts for a pool, or goes on doing so."""

    pool: _Model
    autoscaler_id: _Run
    ttl_ms: int = Field(ge=0, le=600_000, description="how long the claim lasts unless it is made again; 0 gives it up")


class AutoscalerAnswer(_Message):
    """Whether it acts: one autoscaler does at a time."""

    acting: bool


class DeadLetter(_Message):
    """A job whose attempts were used up. ``worker`` ran the last of them, as this session_id."""

    id: str = Field(description="shard and place: 0:1795538964155-0")
    job_id: str
    at_ms: int = Field(description="when, by the queue's clock, in ms since 1970")
    model: str
    tenant: str
    lane: Lane
    cause: str
    worker: str
    attempts: int
    size_bytes: int


class DeadLetterList(_Message):
    """``GET /fabric/v1/dead`` (join token needed), oldest first. ``next``: pass it as ``after`` for the next page."""

    letters: list[DeadLetter]
    next: str = ""


class DeadRequest(DeadLetter):
    """``GET /fabric/v1/dead/{id}``: a letter with the request. ``unreadable``: why there is none."""

    path: str = ""
    content_type: str = ""
    request_id: str = ""
    body_base64: str = ""
    unreadable: str = ""


class DeadLetterIds(_Message):
    """``POST /fabric/v1/dead/purge``: the dead letters to remove."""

    ids: list[Annotated[str, Field(max_length=60)]] = Field(max_length=1_000)


class RemovedCount(_Message):
    """How many dead letters were removed."""

    removed: int

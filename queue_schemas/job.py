"""The envelope of a job, packed by Routers and batchers, unpacked and checked by workers.

``body`` is the client's own bytes and travels unread, so every parameter of today's or tomorrow's engine works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from functools import lru_cache
from typing import Any, Literal

from . import codec
from . import headers as http_headers
from .errors import BadMessage, UnsupportedVersion
from .ids import JobId, Pool, Tenant, check_name, check_region, shard_of_job
from .lanes import BANDS, DEFAULT_BAND, Lane
from .records import record

ENVELOPE_VERSION = 1
"""Major version of the envelope. Fields may be added within a version; readers ignore those they do not know."""

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1_000.0
"""Bounds of a tenant's weight."""
MAX_COST = 30_000_000
"""What no request costs more than: a model reads and writes fewer than ten million tokens."""
MAX_YIELDS = 100
"""How often a job may yield at most."""

OnLoss = Literal["continue", "restart", "fail"]


@record(kw_only=True)
class Job:
    """One request, queued once.

    ``path`` is the engine's (``/v1/chat/completions``). ``reply_to`` is the session id of the Router that waits, empty
    for a ``persisted`` job, whose output any number of Routers read (:mod:`queue_schemas.persisted_output`).
    ``idempotency_key`` is the client's name for it. ``ttl_ms`` counts from the enqueue on the server's clock.
    ``max_attempts`` bounds how often it is started. ``on_loss`` says what happens to a stream whose attempt was lost
    after some of it was delivered: ``continue`` (the queue asks the Router for what was delivered, and the next attempt
    continues it), ``restart`` (it runs again and is compared) or ``fail``. ``prefix`` is the text behind which the
    next attempt goes on: what was delivered of a stream, or what was said before the job yielded. ``yields`` is how
    often it may yield its slot to interactive work. ``cost_estimate`` is in tokens (:mod:`scheduling.cost`),
    ``weight`` its tenant's share against others', ``affinity`` a prefix hash, all for scheduling.
    ``request_id`` is what the client sees in ``x-request-id``; ``traceparent`` is W3C Trace Context. ``headers`` are
    the request headers passed to the engine (:mod:`queue_schemas.headers`); None from a Router that reads no headers of
    answers. ``deadline_from`` names the setting or header that ``ttl_ms`` comes from. Workers of ``region`` claim the
    job first, others once it has waited for ``remote_after_ms``; without a region any worker may at once.
    """

    id: JobId
    tenant: Tenant
    model: Pool
    path: str
    body: bytes
    content_type: str = "application/json"
    lane: Lane = Lane.INTERACTIVE
    band: int = DEFAULT_BAND
    stream: bool = False
    persisted: bool = False
    ttl_ms: int = 600_000
    max_attempts: int = 3
    on_loss: OnLoss = "restart"
    cost_estimate: int = 0
    weight: float = 1.0
    affinity: str = ""
    reply_to: str = ""
    traceparent: str = ""
    idempotency_key: str = ""
    request_id: str = ""
    region: str = ""
    remote_after_ms: int = 0
    prefix: str = ""
    headers: Mapping[str, str] | None = field(default=None, hash=False)
    deadline_from: str = ""
    yields: int = 0

    def pack(self) -> bytes:
        """The envelope as msgpack: a map with ``v`` first. An empty region or prefix, a weight of 1 and no yields are
        omitted."""
        fields: dict[str, Any] = {
            "v": ENVELOPE_VERSION,
            "id": self.id,
            "tenant": self.tenant,
            "model": self.model,
            "lane": self.lane.value,
            "band": self.band,
            "path": self.path,
            "body": self.body,
            "content_type": self.content_type,
            "stream": self.stream,
            "persisted": self.persisted,
            "ttl_ms": self.ttl_ms,
            "max_attempts": self.max_attempts,
            "on_loss": self.on_loss,
            "cost_estimate": self.cost_estimate,
            "affinity": self.affinity,
            "reply_to": self.reply_to,
            "traceparent": self.traceparent,
            "idempotency_key": self.idempotency_key,
            "request_id": self.request_id,
        }
        if self.region:
            fields["region"], fields["remote_after_ms"] = self.region, self.remote_after_ms
        if self.prefix:
            fields["prefix"] = self.prefix
        if self.headers is not None:
            fields["headers"] = dict(self.headers)
        if self.weight != 1.0:
            fields["weight"] = self.weight
        if self.deadline_from:
            fields["deadline_from"] = self.deadline_from
        if self.yields:
            fields["yields"] = self.yields
        return codec.encode(fields)

    @classmethod
    def unpack(cls, data: bytes) -> Job:
        """The job in ``data``. Raises ``UnsupportedVersion`` or ``BadMessage``, each naming the field at fault."""
        fields = codec.decode(data)
        if not isinstance(fields, dict):
            raise BadMessage("an envelope is a map")
        version = fields.get("v")
        if version != ENVELOPE_VERSION:
            raise UnsupportedVersion(
                f"envelope version {repr(version)[:60]}; this build reads version {ENVELOPE_VERSION}: "
                "upgrade it, or drain the queue first"
            )
        if not _NAMES.issuperset(fields):
            fields = {name: value for name, value in fields.items() if name in _NAMES}
        del fields["v"]
        shape = _shape_of(tuple(fields))
        if tuple(map(type, fields.values())) != shape.types:
            raise _wrong_type(fields)
        for name, check in shape.checks:
            fields[name] = check(fields[name])
        if shape.missing:
            raise BadMessage(f"the envelope lacks {', '.join(sorted(shape.missing))}")
        shard_of_job(fields["id"])
        check_name(fields["model"], "model")
        check_name(fields["tenant"], "tenant")
        return cls(**fields)


@record
class _Shape:
    """What is checked of an envelope with certain fields: their types, in order; what else of which; who is missing."""

    types: tuple[type, ...]
    checks: tuple[tuple[str, Callable[[Any], Any]], ...]
    missing: frozenset[str]


@lru_cache(64)
def _shape_of(names: tuple[str, ...]) -> _Shape:
    """The shape of an envelope with the fields of ``names``, all of them known: a build writes few sets of them."""
    return _Shape(
        tuple(_FIELDS[name][0] for name in names),
        tuple((name, check) for name in names if (check := _FIELDS[name][1]) is not None),
        frozenset(_REQUIRED.difference(names)),
    )


def _wrong_type(fields: dict[str, Any]) -> BadMessage:
    name, value, expected = next(
        (name, value, _FIELDS[name][0]) for name, value in fields.items() if type(value) is not _FIELDS[name][0]
    )
    return BadMessage(f"envelope field {name} is {type(value).__name__}, not {expected.__name__}")


def _headers(value: dict[Any, Any]) -> dict[str, str]:
    return http_headers.read_headers(value, http_headers.ENGINE_HEADERS, http_headers.MAX_REQUEST_BYTES)


def _lane(value: str) -> Lane:
    lane = _LANES.get(value)
    if lane is None:
        raise BadMessage(f"unknown lane {value[:60]!r}")
    return lane


def _on_loss(value: str) -> str:
    if value not in ("continue", "restart", "fail"):
        raise BadMessage(f"unknown on_loss {value[:60]!r}")
    return value


def _band(value: int) -> int:
    if not 0 <= value < BANDS:
        raise BadMessage(f"band {value} is not in 0..{BANDS - 1}")
    return value


def _remote_after_ms(value: int) -> int:
    if value < 0:
        raise BadMessage(f"remote_after_ms is {value}; it must not be below 0")
    return value


def _yields(value: int) -> int:
    if not 0 <= value <= MAX_YIELDS:
        raise BadMessage(f"yields is {value}; it must be 0 to {MAX_YIELDS}")
    return value


def _at_least_one(name: str) -> Callable[[int], int]:
    def check(value: int) -> int:
        if value < 1:
            raise BadMessage(f"{name} is {value}; it must be at least 1")
        return value

    return check


_LANES = {lane.value: lane for lane in Lane}
_REQUIRED = {"id", "tenant", "model", "path", "body"}
_FIELDS: dict[str, tuple[type, Callable[[Any], Any] | None]] = {
    "id": (str, None),
    "tenant": (str, None),
    "model": (str, None),
    "lane": (str, _lane),
    "band": (int, _band),
    "path": (str, None),
    "body": (bytes, None),
    "content_type": (str, None),
    "stream": (bool, None),
    "persisted": (bool, None),
    "ttl_ms": (int, _at_least_one("ttl_ms")),
    "max_attempts": (int, _at_least_one("max_attempts")),
    "on_loss": (str, _on_loss),
    "cost_estimate": (int, None),
    "weight": (float, None),
    "affinity": (str, None),
    "reply_to": (str, None),
    "traceparent": (str, None),
    "idempotency_key": (str, None),
    "request_id": (str, None),
    "region": (str, check_region),
    "remote_after_ms": (int, _remote_after_ms),
    "prefix": (str, None),
    "headers": (dict, _headers),
    "deadline_from": (str, lambda value: value[:200]),
    "yields": (int, _yields),
}
"""What an envelope may hold: each field's type, and what else is checked of it."""
_NAMES = frozenset({"v", *_FIELDS})

"""RQ queues, each of which runs one function, and the locks of their jobs; for the batcher and the notifier.

RQ has no asynchronous client: every call here blocks. Nothing in RQ's Redis is needed to recover: batcher and notifier
put lost jobs back from the file store. Keys beside RQ's own start with ``rq:inferq:``, so that one ACL rule (``~rq:*``)
covers all; ``rq:inferq:lock:<name>`` holds the token of a lock's holder, other ``rq:inferq:<kind>:<name>`` are marks
and counters of the queues' users. All expire.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty

from queue_schemas import BrokerUnavailable, CannotStart
from telemetry import redact_url

from ..redis.urls import check_connection, check_parts, topology_of
from ..settings import BrokerSettings

KEY_PREFIX = "rq:inferq:"
LOCK = "lock"
JOB_LIMIT_S = 120
"""RQ ends a job after so long. Jobs bound themselves to less."""
_FAILURE_TTL_S = 3_600
_CONNECT_LIMIT_S, _COMMAND_LIMIT_S = 3.0, 5.0


RqConnection = redis.Redis
"""What :func:`rq_connection` opens and :class:`RqQueue` takes."""


def rq_connection(settings: BrokerSettings) -> RqConnection:
    """A client of RQ's Redis; it connects on first use. Raises ``CannotStart`` if the queue's Redis cannot serve RQ and
    no other is set."""
    url = settings.rq_redis_url or settings.redis_url
    scheme, topology = topology_of(url) if url else ("", "")
    if topology or not scheme:
        raise CannotStart(
            f"RQ needs a plain Redis, and {redact_url(url)!r} is none (RQ does not support Cluster or Sentinel); set "
            "INFERQ_BROKER_RQ_REDIS_URL to a redis:// URL; its data may be lost without harm"
        )
    options: dict[str, Any] = {} if scheme == "unix" else {"socket_keepalive": True}
    if scheme == "rediss" and settings.tls_ca_file:
        options["ssl_ca_certs"] = settings.tls_ca_file
    try:
        check_parts(url)
        client = redis.Redis.from_url(
            url,
            socket_connect_timeout=_CONNECT_LIMIT_S,
            socket_timeout=_COMMAND_LIMIT_S,
            health_check_interval=15,
            retry=Retry(ExponentialBackoff(0.5, 0.05), 1),
            **options,
        )
        check_connection(client.connection_pool.make_connection)
        return client
    except (ValueError, redis.RedisError) as error:
        raise CannotStart(f"the Redis URL {redact_url(url)!r} is not valid: {error}") from error


class RqJob(Job):
    """A job that runs one function, whatever name is in Redis: write access to Redis must not mean running any code."""

    runs = ""
    """The full name of the function."""

    def perform(self) -> Any:
        if self.func_name != self.runs:
            raise PermissionError(f"{self.func_name!r} is not a job of this queue, which runs {self.runs} only")
        return super().perform()

    @property
    def success_callback(self) -> None:
        return None

    @property
    def failure_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None

    def send_webhooks(self, *_: Any, **__: Any) -> None:
        return None


class RqQueue:
    """A queue of jobs that run one function, and named locks for them. All methods raise ``BrokerUnavailable`` when
    RQ's Redis cannot be reached."""

    def __init__(self, connection: RqConnection, name: str, job_class: type[RqJob]) -> None:
        self.connection = connection
        self._runs = job_class.runs
        self.queue = Queue(
            name,
            connection=connection,
            serializer=JSONSerializer,
            job_class=job_class,
            death_penalty_class=TimerDeathPenalty,
        )

    def enqueue(self, job_id: str, description: str, *args: str) -> None:
        """Put a job on the queue."""
        with rq_errors():
            self.queue.enqueue_call(
                func=self._runs,
                args=args,
                job_id=job_id,
                description=description,
                timeout=JOB_LIMIT_S,
                result_ttl=0,
                failure_ttl=_FAILURE_TTL_S,
            )

    def waiting_count(self) -> int:
        """How many jobs are on the queue."""
        with rq_errors():
            return int(self.queue.count)

    def waiting_ids(self) -> list[str]:
        """The ids of the jobs on the queue."""
        with rq_errors():
            return list(self.queue.get_job_ids())

    def is_locked(self, name: str) -> bool:
        """Whether anyone holds the lock."""
        with rq_errors():
            return bool(self.connection.exists(_lock(name)))

    def lock(self, name: str, token: str, ttl_ms: int) -> bool:
        """Take the lock; False if another token holds it."""
        with rq_errors():
            return bool(self.connection.set(_lock(name), token, nx=True, px=ttl_ms))

    def renew_lock(self, name: str, token: str, ttl_ms: int) -> bool:
        """Hold the lock for ``ttl_ms`` from now, taking it again if it expired; False if another token holds it."""
        key = _lock(name)
        with rq_errors():
            mine = self.connection.get(key) == token.encode()
            renewed = mine and bool(self.connection.pexpire(key, ttl_ms))
            return renewed or bool(self.connection.set(key, token, nx=True, px=ttl_ms))

    def unlock(self, name: str, token: str) -> None:
        """Release the lock if ``token`` holds it."""
        key = _lock(name)
        with rq_errors():
            if self.connection.get(key) == token.encode():
                self.connection.delete(key)

    def mark(self, kind: str, name: str, ttl_ms: int) -> None:
        """Set the mark of this ``kind`` on ``name`` for a while."""
        with rq_errors():
            self.connection.set(_key(kind, name), "", px=max(ttl_ms, 1))

    def count(self, kind: str, name: str, ttl_s: int) -> int:
        """Add one to a counter, which expires ``ttl_s`` after its last increase; its value."""
        key = _key(kind, name)
        with rq_errors():
            count: Any = self.connection.incr(key)
            self.connection.expire(key, ttl_s)
            return int(count)

    def tell(self, kind: str, name: str, field: str, value: str, ttl_s: int) -> None:
        """Set one field of what several processes tell each other of ``name``; all of it expires ``ttl_s`` after the
        last."""
        key = _key(kind, name)
        with rq_errors():
            self.connection.hset(key, field, value)
            self.connection.expire(key, ttl_s)

    def told(self, kind: str, name: str) -> dict[str, str]:
        """What is told of ``name``, by field. What cannot be read is left out."""
        with rq_errors():
            fields: Any = self.connection.hgetall(_key(kind, name))
        return {field.decode(errors="replace"): value.decode(errors="replace") for field, value in fields.items()}

    def forget_told(self, kind: str, name: str, fields: Sequence[str]) -> None:
        """Remove fields of what is told of ``name``."""
        if fields:
            with rq_errors():
                self.connection.hdel(_key(kind, name), *fields)

    def find_marked(self, kinds: Sequence[str], names: Sequence[str]) -> set[str]:
        """Those of ``names`` that have a lock, mark or counter of one of these ``kinds``."""
        keys = [_key(kind, name) for name in names for kind in kinds]
        if not keys:
            return set()
        with rq_errors():
            values: list[Any] = self.connection.mget(keys)
        return {names[at // len(kinds)] for at, value in enumerate(values) if value is not None}

    def remove_marks(self, kinds: Sequence[str], names: Iterable[str]) -> None:
        """Remove the marks and counters of these ``kinds`` from ``names``."""
        keys = [_key(kind, name) for name in names for kind in kinds]
        if keys:
            with rq_errors():
                self.connection.delete(*keys)


@contextmanager
def rq_errors() -> Iterator[None]:
    """Raise ``BrokerUnavailable`` for errors of RQ's Redis."""
    try:
        yield
    except (redis.RedisError, OSError) as error:
        refused = isinstance(error, redis.exceptions.NoPermissionError | redis.AuthenticationError)
        advice = "; give batcher and notifier a Redis user of their own, see docs/topologies.md" if refused else ""
        raise BrokerUnavailable(f"RQ's Redis cannot be used now ({type(error).__name__}: {error}){advice}") from error


def _lock(name: str) -> str:
    return _key(LOCK, name)


def _key(kind: str, name: str) -> str:
    return f"{KEY_PREFIX}{kind}:{name}"

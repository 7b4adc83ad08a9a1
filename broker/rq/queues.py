"""RQ's side: the one queue of steps, what is on it, and who runs a step of which batch.

This is all that batches keep in Redis beside the jobs of their lines, and none of it is needed: what is lost here is
put back from the store by the sweep. RQ has no asynchronous client; every call here blocks.

Keys beside RQ's own, so that one ACL rule (``~rq:*``) allows all: ``rq:inferq:lock:<batch>`` (the step that runs, by a
token; expires), ``rq:inferq:pause:<batch>`` (not before it expires), ``rq:inferq:failures:<batch>`` (steps that failed
one after the other; expires).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty

from broker import BrokerSettings
from queue_schemas import BrokerUnavailable, CannotStart, Tenant
from telemetry import redact_url

from ..redis.urls import check_connection, check_parts, topology_of

BATCHES_QUEUE = "inferq-batches"
STEP_LIMIT_S = 120
"""After so long RQ gives a step up. It bounds itself long before."""
FAILURE_TTL_S = 3_600
_FAILURES_TTL_S = 3_600
_KEY = "rq:inferq:"
_CONNECT_LIMIT_S, _COMMAND_LIMIT_S = 3.0, 5.0


def rq_connection(queue: BrokerSettings) -> redis.Redis:
    """A client of RQ's server; connects on first use. Raises ``CannotStart`` where the queue's own will not do."""
    url = queue.rq_redis_url or queue.redis_url
    scheme, topology = topology_of(url) if url else ("", "")
    if topology or not scheme:
        raise CannotStart(
            f"RQ needs a plain Redis, and {redact_url(url)!r} is none (it knows no Cluster and no Sentinel); set "
            "INFERQ_BROKER_RQ_REDIS_URL to a redis:// URL: what it holds may be lost"
        )
    options: dict[str, Any] = {} if scheme == "unix" else {"socket_keepalive": True}
    if scheme == "rediss" and queue.tls_ca_file:
        options["ssl_ca_certs"] = queue.tls_ca_file
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


class OwnJob(Job):
    """A job that runs one function, whatever name stands in Redis: whoever may write there must not choose our code."""

    runs = ""
    """The full name of the function."""

    def perform(self) -> Any:
        if self.func_name != self.runs:
            raise PermissionError(f"{self.func_name!r} is no job of this queue, which runs {self.runs} alone")
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


class StepJob(OwnJob):
    """One step of a batch."""

    runs = "batches.steps.advance"


class OwnQueue:
    """A queue of jobs that run one function, and locks by name, for who may run one. All methods raise
    ``BrokerUnavailable`` when RQ's Redis cannot be reached."""

    def __init__(self, connection: redis.Redis, name: str, job_class: type[OwnJob]) -> None:
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
        with _errors():
            self.queue.enqueue_call(
                func=self._runs,
                args=args,
                job_id=job_id,
                description=description,
                timeout=STEP_LIMIT_S,
                result_ttl=0,
                failure_ttl=FAILURE_TTL_S,
            )

    def locked(self, name: str) -> bool:
        """Whether somebody has that lock."""
        with _errors():
            return bool(self.connection.exists(f"{_KEY}lock:{name}"))

    def lock(self, name: str, token: str, ttl_ms: int) -> bool:
        """Take the lock, unless somebody has it."""
        with _errors():
            return bool(self.connection.set(f"{_KEY}lock:{name}", token, nx=True, px=ttl_ms))

    def keep_lock(self, name: str, token: str, ttl_ms: int) -> bool:
        """Whether nobody else has the lock, which is ours for so long from now."""
        key = f"{_KEY}lock:{name}"
        with _errors():
            mine = self.connection.get(key) == token.encode()
            kept = mine and bool(self.connection.pexpire(key, ttl_ms))
            return kept or bool(self.connection.set(key, token, nx=True, px=ttl_ms))

    def unlock(self, name: str, token: str) -> None:
        """Let go of the lock."""
        key = f"{_KEY}lock:{name}"
        with _errors():
            if self.connection.get(key) == token.encode():
                self.connection.delete(key)

    def others_wait(self) -> int:
        """How many jobs are on the queue."""
        with _errors():
            return int(self.queue.count)


class StepQueue(OwnQueue):
    """The steps that wait."""

    def __init__(self, connection: redis.Redis) -> None:
        super().__init__(connection, BATCHES_QUEUE, StepJob)

    def put(self, tenant: Tenant, batch_id: str, what: str, number: int) -> None:
        """Put the next step of a batch on the queue; ``number`` makes its id one of its own, ``what`` says for people
        what it is."""
        self.enqueue(f"{batch_id}-{number}", f"{what} ({batch_id} of {tenant})", tenant, batch_id)

    def waiting(self) -> set[str]:
        """Batches whose next step is on the queue."""
        with _errors():
            return {job_id.rpartition("-")[0] for job_id in self.queue.get_job_ids()}

    def held(self, batch_ids: Sequence[str]) -> set[str]:
        """Those of which a step runs, or which are to be left alone for a while."""
        if not batch_ids:
            return set()
        keys = [f"{_KEY}{kind}:{batch_id}" for batch_id in batch_ids for kind in ("lock", "pause")]
        with _errors():
            values: list[Any] = self.connection.mget(keys)
        return {batch_ids[at // 2] for at, value in enumerate(values) if value is not None}

    def pause(self, batch_id: str, pause_ms: int) -> None:
        """Leave a batch alone for a while."""
        with _errors():
            self.connection.set(f"{_KEY}pause:{batch_id}", "", px=max(pause_ms, 1))

    def failed(self, batch_id: str) -> int:
        """A step failed: how many have now, one after the other."""
        key = f"{_KEY}failures:{batch_id}"
        with _errors():
            count: Any = self.connection.incr(key)
            self.connection.expire(key, _FAILURES_TTL_S)
            return int(count)

    def forget(self, batch_ids: Iterable[str], *kinds: str) -> None:
        """Remove what is kept of batches: ``pause``, ``failures``."""
        keys = [f"{_KEY}{kind}:{batch_id}" for batch_id in batch_ids for kind in kinds]
        if keys:
            with _errors():
                self.connection.delete(*keys)


class _errors:  # noqa: N801 - used as a function
    """RQ's server cannot be used: as an error of ours."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, redis.RedisError | OSError):
            refused = isinstance(error, redis.exceptions.NoPermissionError | redis.AuthenticationError)
            mend = "; give batcher and notifier a Redis user of their own, see docs/topologies.md" if refused else ""
            raise BrokerUnavailable(f"RQ's Redis cannot be used now ({type(error).__name__}: {error}){mend}") from error

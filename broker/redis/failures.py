"""What an error of redis-py means for a caller: a :class:`Failure`, from one table, and the error of ours to raise."""

from __future__ import annotations

from enum import Enum, auto

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MaxConnectionsError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    TryAgainError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from queue_schemas import BrokerFull, BrokerUnavailable, BrokerUnsuitable

UNREACHABLE: tuple[type[Exception], ...] = (
    RedisConnectionError,
    RedisTimeoutError,
    BusyLoadingError,
    ReadOnlyError,
    ClusterDownError,
    MasterDownError,
    TryAgainError,
    MaxConnectionsError,
    RedisClusterException,
    ConnectionError,
    TimeoutError,
    OSError,
)
"""Raised by a server that is away, loading or failing over: the same call may succeed in a moment."""

FAILURES: tuple[type[Exception], ...] = (RedisError, RedisClusterException, OSError, TimeoutError)
"""Everything that a command may raise, the above included."""


class Failure(Enum):
    """Why a command failed."""

    REFUSED = auto()
    """The server does not accept our user or password, or forbids a command: trying again does not help."""
    SCRIPT_REFUSED = auto()
    """The same, of a command within a script."""
    MEMORY_FULL = auto()
    DISK_FAILED = auto()
    READ_ONLY = auto()
    """The server is a replica."""
    LOADING = auto()
    WRITES_REFUSED = auto()
    """The server has too few replicas, or has lost its primary."""
    UNREACHABLE = auto()
    OTHER = auto()


_BY_CLASS: tuple[tuple[Failure, tuple[type[Exception], ...]], ...] = (
    (Failure.REFUSED, (AuthenticationError, AuthorizationError, NoPermissionError)),
    (Failure.MEMORY_FULL, (OutOfMemoryError,)),
    (Failure.READ_ONLY, (ReadOnlyError,)),
    (Failure.LOADING, (BusyLoadingError,)),
    (Failure.WRITES_REFUSED, (MasterDownError,)),
    (Failure.UNREACHABLE, UNREACHABLE),
)
"""The first match counts: some of these classes are subclasses of ``ConnectionError``."""

_BY_CODE = {
    "NOAUTH": Failure.REFUSED,
    "WRONGPASS": Failure.REFUSED,
    "NOPERM": Failure.REFUSED,
    "OOM": Failure.MEMORY_FULL,
    "MISCONF": Failure.DISK_FAILED,
    "NOREPLICAS": Failure.WRITES_REFUSED,
    "MASTERDOWN": Failure.WRITES_REFUSED,
}
"""By the first word of the server's reply, for the codes that redis-py has no class for, or reports without theirs."""

_SCRIPT_REFUSALS = ("ACL failure in script", "The user executing the script can't")
"""Redis 7.0 has no error code for a command that its user may not send within a script, and does not name it."""


def failure_of(error: BaseException) -> Failure:
    """What ``error``, raised by redis-py, means."""
    for failure, classes in _BY_CLASS:
        if isinstance(error, classes):
            return failure
    text = str(error)
    by_code = _BY_CODE.get(text.partition(" ")[0])
    if by_code is not None:
        return by_code
    return Failure.SCRIPT_REFUSED if any(words in text for words in _SCRIPT_REFUSALS) else Failure.OTHER


def as_inferq_error(error: BaseException) -> BrokerUnavailable | BrokerUnsuitable | BrokerFull:
    """The error of ours that tells a caller what ``error`` means."""
    match failure_of(error):
        case Failure.REFUSED:
            return BrokerUnsuitable(
                f"Redis denies access: {error}; check the user and password in INFERQ_REDIS_URL and the "
                "user's ACL rules (a Manager gives the password only to callers with its join token: "
                "INFERQ_JOIN_TOKEN; the embedded queue's is found in the folder INFERQ_DATA_DIR)",
                public="the queue's Redis denies access; the operator finds the reason in the log",
            )
        case Failure.SCRIPT_REFUSED:
            return BrokerUnsuitable(
                f"Redis rejects a command of a script: {error}; ACL LOG on the server names the command or key, and "
                "docs/topologies.md the rules that a user needs"
            )
        case Failure.MEMORY_FULL | Failure.DISK_FAILED:
            return BrokerFull(
                f"the queue's Redis takes no more work now: {error}; free memory or disk, or raise maxmemory",
                retry_after_s=10,
            )
        case _ if isinstance(error, UNREACHABLE):
            return BrokerUnavailable(
                f"the queue's Redis cannot be reached ({type(error).__name__}: {error}); try again shortly",
                retry_after_s=2,
                public="the queue's Redis cannot be reached; try again shortly",
            )
        case _:
            # Other errors (a slow script of another client, a failover) may pass: the server was checked at the start.
            return BrokerUnavailable(
                f"the queue's Redis answers with an error: {error}; try again shortly", retry_after_s=2
            )

"""What redis-py raises, by what it means for a caller."""

from __future__ import annotations

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MaxConnectionsError,
    NoPermissionError,
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
"""What a server that is away, loading or failing over raises: the same call may succeed in a moment."""

REFUSED: tuple[type[Exception], ...] = (AuthenticationError, AuthorizationError, NoPermissionError)
"""What a server raises that will not have us: trying again does not help."""

FAILURES: tuple[type[Exception], ...] = (RedisError, RedisClusterException, OSError, TimeoutError)
"""Everything that a command may raise, the above included."""

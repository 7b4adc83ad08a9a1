"""Check a Redis URL before the first connection, and name its topology.

redis-py takes a database that is no number for database 0, and finds a parameter that it does not know, or a file that
is not there, at each attempt to connect, as if the server were away.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from redis.exceptions import RedisError

from queue_schemas import BrokerUnsuitable
from telemetry import redact_url

_DATABASE = re.compile(r"(/\d*)?/?", re.ASCII)


def topology_of(url: str) -> tuple[str, str]:
    """The scheme of ``url`` and its topology (``sentinel``, ``cluster``, empty for one server). Raises
    ``BrokerUnsuitable`` for what is no Redis URL."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise invalid_url(url, error) from error
    scheme, _, topology = parts.scheme.partition("+")
    if scheme not in ("redis", "rediss", "unix") or topology not in ("", "sentinel", "cluster"):
        raise BrokerUnsuitable(
            f"the Redis URL {redact_url(url)!r} is not understood; use redis://HOST:PORT, rediss://, unix://, "
            "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE or redis+cluster://HOST:PORT,HOST:PORT"
        )
    return scheme, topology


def check_parts(url: str) -> None:
    """Raises ``ValueError`` for parts of ``url`` that would not mean what they say."""
    _check_encoding(url)
    scheme, topology = topology_of(url)
    parts = urlsplit(url)
    if topology and parts.query:
        raise ValueError("parameters behind ? are for a single server; of others, set the [broker] settings")
    if topology == "cluster" and parts.path.strip("/") not in ("", "0"):
        raise ValueError("a cluster has no database but 0: leave out what follows the hosts")
    if not topology and scheme != "unix" and not _DATABASE.fullmatch(parts.path):
        raise ValueError("its path must be the number of a database, as in redis://HOST:PORT/0")


def check_connection(make_connection: Callable[[], Any]) -> None:
    """Make a connection without connecting, and read its TLS files. Raises ``ValueError`` with what is wrong."""
    try:
        connection = make_connection()
    except TypeError as error:
        raise ValueError(f"it has a parameter that is not known, {str(error).rpartition(' ')[2]}") from error
    try:
        for name in ("ca_certs", "certfile", "keyfile"):
            if path := getattr(connection, name, None):
                Path(path).open("rb").close()
        context = getattr(connection, "ssl_context", None)
        if context is not None:
            context.get()
    except (OSError, RedisError) as error:
        raise ValueError(f"a TLS file that it names cannot be used: {error}") from error


def check_ca_file(path: str) -> None:
    """Raises ``ValueError`` if ``tls_ca_file`` cannot be used: a caller that connects would report the server as
    unreachable."""
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ValueError(f"tls_ca_file (INFERQ_BROKER_TLS_CA_FILE) {path!r} cannot be used: {error}") from error


def invalid_url(url: str, error: Exception) -> BrokerUnsuitable:
    """The refusal of ``url``, without its password."""
    return BrokerUnsuitable(f"the Redis URL {redact_url(url)!r} is not valid: {error}")


def _check_encoding(url: str) -> None:
    """Refuse a password that breaks the URL apart; the error of a later parser would quote a part of it."""
    rest = url.partition("://")[2]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    _, colon, port = authority.rpartition(":")
    if authority and "@" in rest and "@" not in authority and colon and not port.isdigit():
        raise ValueError("write the characters / ? # @ in a user or password as %2F %3F %23 %40")

"""Who may call a service that asks for no credential."""

from __future__ import annotations

import pytest

from queue_schemas import PermissionRefused
from queue_schemas.addresses import hide_addresses
from telemetry.http.loopback_access import LoopbackAccess, is_loopback_host
from telemetry.redaction import has_credentials, without_credentials

LOOPBACK = [
    "127.0.0.1", "127.0.0.1:18000", "127.1.2.3:80", "localhost", "LOCALHOST:9000", "localhost.", "app.localhost:1",
    "[::1]", "[::1]:18000",
]  # fmt: skip
FOREIGN = [
    "evil.example", "evil.example:18000", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0:18000",
    "[::]:1", "10.0.0.1", "192.168.0.1:18000", "169.254.169.254", "[fe80::1]", "notlocalhost", "127.0.0.1@evil.example",
    "evil.example:80:127.0.0.1", "[::1", "127.0.0.1:x", "2130706433", "0x7f000001", "127.1", "é", "x" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_names_are_let_in(host: str) -> None:
    """[A3] Every way to write this machine in a Host header."""
    assert is_loopback_host(host.encode())
    LoopbackAccess().check({b"host": host.encode()})


@pytest.mark.parametrize("host", FOREIGN)
def test_every_other_name_is_refused(host: str) -> None:
    """[A3] A page whose name was made to resolve to 127.0.0.1 (DNS rebinding) sends its own name, also as origin."""
    header = host.encode("utf-8")
    for headers in ({b"host": header}, {b"host": header, b"origin": b"http://" + header}):
        with pytest.raises(PermissionRefused, match="loopback names only"):
            LoopbackAccess().check(headers)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://localhost:3000", "http://127.0.0.1"])
def test_a_foreign_origin_is_refused(origin: str) -> None:
    """[A3] A page of another origin, another port of this machine included, unless the origin is allowed."""
    headers = {b"host": b"127.0.0.1:18000", b"origin": origin.encode()}
    for callers in (LoopbackAccess(), LoopbackAccess(any_host=True)):
        with pytest.raises(PermissionRefused, match="another origin"):
            callers.check(headers)
    for allowed in (origin, "*"):
        LoopbackAccess(origins=frozenset({allowed})).check(headers)


def test_its_own_pages_and_insecure_ones_are_let_in() -> None:
    """The service's own documentation page may call it; with --insecure on a public address it has any name."""
    LoopbackAccess().check({b"host": b"LocalHost:18000", b"origin": b"http://localhost:18000"})
    LoopbackAccess().check({})
    LoopbackAccess(any_host=True).check({b"host": b"router.internal"})


@pytest.mark.parametrize(
    ("url", "bare"),
    [
        ("redis://:pw@h:1/0", "redis://h:1/0"),
        ("rediss://u:p@ss@h:1/0", "rediss://h:1/0"),
        ("redis://h:1/0?password=x&ssl_cert_reqs=none", "redis://h:1/0?ssl_cert_reqs=none"),
        ("redis+sentinel://:pw@a:1,b:2/svc?sentinel_password=x", "redis+sentinel://a:1,b:2/svc"),
        ("unix://:pw@/run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("no url", ""),
    ],
)
def test_credentials_are_left_out_of_urls(url: str, bare: str) -> None:
    """[A3] User, password and secret parameters go, whatever else is in the URL stays."""
    assert without_credentials(url) == bare
    assert has_credentials(url) == (url != bare)


@pytest.mark.parametrize(
    "text",
    [
        "Error 111 connecting to redis.internal:6379. Connection refused.",
        "Cannot connect to host 10.1.2.3:9000 ssl:default [Connect call failed ('10.1.2.3', 9000)]",
        "http://manager.internal:9000 does not answer",
        "No master found: Redis<ConnectionPool<Connection(host=10.1.2.3,port=6379)>>",
        "vLLM is starting on port 6379", "see /var/lib/inferq/logs/redis.internal", "[fd00::1]:6379 is away",
        "ended; its last lines:\nredis.internal:6379",
    ],
)  # fmt: skip
def test_addresses_are_hidden_in_sentences(text: str) -> None:
    """[A4] What other libraries put into words is told without hosts, ports and paths."""
    told = hide_addresses(text)
    assert not any(part in told for part in ("redis.internal", "manager.internal", "10.1.2.3", "6379", "9000", "/var"))
    assert told.strip()

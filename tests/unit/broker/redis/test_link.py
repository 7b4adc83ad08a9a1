"""URLs of the broker: which are understood, and that none leaks its password."""

from __future__ import annotations

import pytest

from broker import BrokerSettings
from broker.redis.cluster import ClusterLink
from broker.redis.link import MultiplexedLink, open_link
from queue_schemas import BrokerUnsuitable


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("redis://127.0.0.1:6379/0", MultiplexedLink),
        ("rediss://user:secret@redis.example:6380", MultiplexedLink),
        ("unix:///run/redis.sock", MultiplexedLink),
        ("redis+sentinel://user:secret@a:26379,b/mymaster/0", MultiplexedLink),
        ("rediss+sentinel://a:26379/mymaster", MultiplexedLink),
        ("redis+cluster://user:secret@a:7000,b:7001", ClusterLink),
    ],
)
async def test_every_topology_has_a_url(url: str, kind: type) -> None:
    """Standalone, TLS, socket, Sentinel and Cluster URLs each open a link without connecting yet."""
    link = open_link(BrokerSettings(redis_url=url))
    assert isinstance(link, kind)
    await link.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://a",
        "redis+ring://a",
        "redis+sentinel://user:secret@a:26379",
        "redis+cluster://:secret@",
        "127.0.0.1:6379",
        "redis://:secret/x@host/0",
        "redis+sentinel://:secret/x@host/0",
        "redis+cluster://u:secret?x@host",
        "foo://u:x@secret@host?password=secret",
    ],
)
def test_a_url_that_is_none_is_refused_without_its_password(url: str) -> None:
    """The error says which forms there are and never repeats a password."""
    with pytest.raises(BrokerUnsuitable) as refused:
        open_link(BrokerSettings(redis_url=url))
    assert "URL" in refused.value.message
    assert "secret" not in refused.value.message

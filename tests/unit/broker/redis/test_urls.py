"""Redis URLs that operators get wrong, and those of a socket: settled before the first connection."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker import Broker, BrokerSettings
from broker.redis.link import open_link
from broker.rq.queues import rq_connection
from queue_schemas import BrokerUnsuitable, InferqError
from tests.support.servers import Server, redis_binary, valkey_binary

ABSENT = "/nowhere/ca.pem"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://[::1", "IPv6"),
        ("redis://u:secret@localhost:6379/0?socket_patience=3", "'socket_patience'"),
        ("redis://u:secret@localhost:6379/production", "number of a database"),
        ("redis://u:secret@localhost:6379/0?socket_timeout=long", "socket_timeout"),
        ("rediss://u:secret@localhost:6379/0?ssl_cert_reqs=maybe", "maybe"),
        (f"rediss://u:secret@localhost:6379/0?ssl_ca_certs={ABSENT}", "TLS file"),
        ("redis+cluster://u:secret@a:6379/3", "no database but 0"),
        ("redis+sentinel://u:secret@a:26379/service?socket_timeout=3", "single server"),
    ],
)
def test_a_url_that_can_never_work_is_refused_at_once(url: str, said: str) -> None:
    """[H30] A parameter, database or file that makes a URL useless is a sentence, not an endless try again."""
    with pytest.raises(BrokerUnsuitable, match="is not valid") as refused:
        open_link(BrokerSettings(redis_url=url))
    assert said in refused.value.message
    assert "secret" not in refused.value.message
    with pytest.raises(InferqError, match="Redis") as refused_by_rq:
        rq_connection(BrokerSettings(rq_redis_url=url))
    assert "secret" not in refused_by_rq.value.message


@pytest.mark.parametrize("url", ["rediss://a", "rediss+sentinel://a/service", "rediss+cluster://a"])
def test_a_missing_authority_file_is_refused_at_once(url: str) -> None:
    """[H30] A CA file that is not there is named, whatever the topology."""
    with pytest.raises(BrokerUnsuitable, match=f"INFERQ_BROKER_TLS_CA_FILE.*{ABSENT}"):
        open_link(BrokerSettings(redis_url=url, tls_ca_file=ABSENT))


async def test_a_unix_socket_serves_the_queue_and_rq(tmp_path: Path) -> None:
    """[H31] A unix:// URL, as the documents name it, reaches a server that listens on a socket."""
    binary = redis_binary() or valkey_binary()
    assert binary is not None
    place = tmp_path / "r.sock"
    server = Server(binary, tmp_path / "data", options=("--unixsocket", str(place))).start()
    try:
        settings = BrokerSettings(redis_url=f"unix://{place}")
        broker = await Broker.connect(settings)
        await broker.close()
        with rq_connection(settings) as connection:
            assert connection.ping()
    finally:
        server.stop()

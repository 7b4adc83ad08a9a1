"""An open connection beside peers that are slow, silent, broken or hostile, on both event loops."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hiredis
import pytest
import uvloop
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from broker.redis import channel
from broker.redis.channel import MAX_UNSENT_BYTES
from broker.redis.multiplexer import MultiplexedConnection
from tests.support.scripted_redis import Peer, connection_to, peer_server
from tests.support.servers import Certificates
from tests.support.waiting import eventually

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:DeprecationWarning")
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    return request.param()


def bulk(body: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(body), body)


async def echo(peer: Peer) -> None:
    """Answers each command with its first argument."""
    while True:
        peer.writer.write(bulk((await peer.command())[0]))


def sends(pieces: Callable[[], list[bytes]], every_s: float) -> Callable[[Peer], Any]:
    """Answers the first command in pieces, then echoes."""

    async def serve(peer: Peer) -> None:
        await peer.command()
        for piece in pieces():
            peer.writer.write(piece)
            await peer.writer.drain()
            await asyncio.sleep(every_s)
        await echo(peer)

    return serve


async def test_replies_that_come_byte_by_byte_reach_their_callers() -> None:
    """However the network cuts them, each caller gets its own."""

    async def serve(peer: Peer) -> None:
        while True:
            for byte in bulk((await peer.command())[0]):
                peer.writer.write(bytes([byte]))
                await peer.writer.drain()
                await asyncio.sleep(0)

    async with peer_server(serve) as port:
        connection = connection_to(port)
        replies = await asyncio.gather(*(connection.command(5, f"c{n}") for n in range(20)))
        assert replies == [b"c%d" % n for n in range(20)]
        await connection.close()


async def test_a_reply_may_take_longer_than_its_limit_while_its_bytes_come() -> None:
    """[H52] A large claim over a slow link goes through, and so do the commands behind it."""
    body = b"x" * (320 * KIB)
    whole = bulk(body)
    pieces = [whole[at : at + 16 * KIB] for at in range(0, len(whole), 16 * KIB)]
    async with peer_server(sends(lambda: pieces, 0.1)) as port:
        connection = connection_to(port)
        began = time.monotonic()
        large, small = await asyncio.gather(connection.command(0.4, "large"), connection.command(0.4, "small"))
        assert (large, small) == (body, b"small")
        assert time.monotonic() - began > 1.5
        await connection.close()


@pytest.mark.parametrize("begun", [b"", b"$100\r\nhalf"])
async def test_silence_times_out(begun: bytes) -> None:
    """Before the reply, and in the middle of it."""
    async with peer_server(sends(lambda: [begun], 60)) as port:
        connection = connection_to(port)
        async with asyncio.timeout(5):
            with pytest.raises(RedisTimeoutError):
                await connection.command(0.2, "silent")
        await connection.close()


async def test_a_reply_that_drips_is_given_up() -> None:
    """[H52] Bytes that come for ever, but slower than any link, hold a caller not much longer than silence does."""
    async with peer_server(sends(lambda: [b"$100000\r\n", *[b"x"] * 10_000], 0.05)) as port:
        connection = connection_to(port)
        async with asyncio.timeout(5):
            with pytest.raises(RedisTimeoutError):
                await connection.command(0.3, "dripping")
        await connection.close()


async def test_a_reply_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even bytes that come fast buy no more than so much time."""
    monkeypatch.setattr(channel, "LONGEST_S", 0.5)
    async with peer_server(sends(lambda: [b"$100000000\r\n", *[b"x" * 10_000] * 10_000], 0.02)) as port:
        connection = connection_to(port)
        async with asyncio.timeout(5):
            with pytest.raises(RedisTimeoutError):
                await connection.command(0.3, "endless")
        await connection.close()


async def test_a_reply_that_waits_while_this_process_is_held_up_is_no_silence() -> None:
    """The peer has answered in time; that nobody looked is not its fault."""
    async with peer_server(echo) as port:
        connection = connection_to(port)
        await connection.command(5, "first")
        await eventually(lambda: connection._channel and not connection._channel._watch, "no command is watched")
        command = asyncio.ensure_future(connection.command(0.2, "next"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(0.8)  # noqa: ASYNC251 - the loop is held up on purpose
        assert await command == b"next"
        await connection.close()


@pytest.mark.parametrize("together", [True, False])
async def test_a_reply_that_nobody_asked_for_ends_the_connection(together: bool) -> None:
    """It would be taken for the next command's."""
    lost = asyncio.Event()

    async def serve(peer: Peer) -> None:
        first = not lost.is_set()
        await peer.command()
        peer.writer.write(b"+ok\r\n+stray\r\n" if together and first else b"+ok\r\n")
        if first and not together:
            await asyncio.sleep(0.05)
            peer.writer.write(b"+stray\r\n")
        if first:
            assert await peer.reader.read() == b""
            lost.set()
        await echo(peer)

    async with peer_server(serve) as port, asyncio.timeout(5):
        connection = connection_to(port)
        assert await connection.command(60, "first") == b"ok"
        await lost.wait()
        assert "nobody asked for" in str(connection.take_loss())
        assert await connection.command(60, "second") == b"ok"
        assert await connection.command(60, "third") == b"third"
        await connection.close()


async def test_what_the_server_says_of_itself_is_no_reply() -> None:
    """A push of RESP3 is passed over."""

    async def serve(peer: Peer) -> None:
        while True:
            await peer.command()
            peer.writer.write(b">2\r\n+message\r\n+x\r\n+ok\r\n>2\r\n+message\r\n+x\r\n")

    async with peer_server(serve) as port:
        connection = connection_to(port, protocol=3)
        for _ in range(3):
            assert await connection.command(5, "c") == b"ok"
        await connection.close()


async def test_half_a_reply_and_the_end_is_a_lost_connection() -> None:
    """It fails at once what waited, and the next command connects again."""

    async def serve(peer: Peer) -> None:
        if (await peer.command())[0] == b"half":
            peer.writer.write(b"$100\r\nhalf")
            await peer.writer.drain()
            peer.writer.close()
            return
        peer.writer.write(b"+ok\r\n")
        await echo(peer)

    async with peer_server(serve) as port, asyncio.timeout(5):
        connection = connection_to(port)
        failures = await asyncio.gather(
            connection.command(60, "half"), connection.command(60, "behind"), return_exceptions=True
        )
        assert all(isinstance(failure, RedisConnectionError) for failure in failures)
        assert await connection.command(60, "again") == b"ok"
        await connection.close()


async def test_a_connection_closed_behind_the_log_in_is_a_lost_connection() -> None:
    """The peer may go at any moment."""

    async def serve(peer: Peer) -> None:
        for _ in range(2):  # CLIENT SETINFO, twice
            for _ in range(9):
                await peer.reader.readline()
            peer.writer.write(b"+OK\r\n")
        await peer.writer.drain()
        peer.writer.close()

    async with peer_server(serve) as port, asyncio.timeout(5):
        connection = connection_to(port)
        with pytest.raises(RedisConnectionError):
            await connection.command(60, "c")
        await connection.close()


async def test_commands_of_one_turn_of_the_loop_go_out_together_and_in_order() -> None:
    """One write for all but the first, which finds nothing under way: that is what makes many callers cheap."""
    reads: list[bytes] = []

    async def serve(peer: Peer) -> None:
        await peer.command()
        peer.writer.write(b"+ok\r\n")
        while sum(map(len, reads)) < len(bulk(b"c10")) * 50:
            reads.append(await peer.reader.read(MIB))
        peer.writer.write(b"".join(bulk(b"c%d" % n) for n in range(50)))
        await peer.reader.read()

    async with peer_server(serve) as port:
        connection = connection_to(port)
        await connection.command(5, "first")
        replies = await asyncio.gather(*(connection.command(5, f"c{n}") for n in range(50)))
        assert replies == [b"c%d" % n for n in range(50)]
        assert len(reads) <= 2
        await connection.close()


async def test_a_caller_cancelled_while_it_connects_disturbs_nobody() -> None:
    """Whoever waits for the same connection gets one."""
    logins = 0

    async def serve(peer: Peer) -> None:
        nonlocal logins
        logins += 1
        if logins == 1:
            await peer.reader.read()
        await echo(peer)

    async with peer_server(serve) as port, asyncio.timeout(5):
        connection = connection_to(port)
        calls = [asyncio.ensure_future(connection.command(5, name)) for name in ("a", "b", "c")]
        await eventually(lambda: logins == 1, "the first is connecting")
        calls[0].cancel()
        assert await asyncio.gather(*calls[1:]) == [b"b", b"c"]
        assert calls[0].cancelled()
        await connection.close()


@pytest.mark.parametrize("turns", range(4))
async def test_a_caller_cancelled_before_or_behind_the_write_disturbs_nobody(turns: int) -> None:
    """Its reply is passed over, whatever had become of its command."""
    async with peer_server(echo) as port, asyncio.timeout(5):
        connection = connection_to(port)
        await connection.command(5, "first")
        for size in (10, 2 * MIB):
            calls = [asyncio.ensure_future(connection.command(5, name, b"x" * size)) for name in ("a", "b", "c")]
            pipeline = asyncio.ensure_future(connection.pipeline(5, [("d",), ("e",)]))
            for _ in range(turns):
                await asyncio.sleep(0)
            calls[1].cancel()
            pipeline.cancel()
            assert await asyncio.gather(calls[0], calls[2], connection.command(5, "f")) == [b"a", b"c", b"f"]
        await connection.close()


class HeldReader:
    """Serves echoes once ``go`` is set, and reads nothing before."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.connections = 0

    async def serve(self, peer: Peer) -> None:
        self.connections += 1
        assert (await peer.command())[0] == b"first"
        peer.writer.write(b"+ok\r\n")
        await self.go.wait()
        await echo(peer)


async def test_commands_wait_while_the_peer_takes_none_and_memory_stays_bounded() -> None:
    """Back-pressure: what is packed and not written is bounded; a caller cancelled meanwhile sends nothing."""
    held = HeldReader()
    async with peer_server(held.serve) as port, asyncio.timeout(20):
        connection = connection_to(port)
        await connection.command(5, "first")
        body = b"x" * (256 * KIB)
        calls = [asyncio.ensure_future(connection.command(10, f"c{n}", body)) for n in range(100)]
        await asyncio.sleep(0.2)
        assert connection._channel is not None
        assert MAX_UNSENT_BYTES <= connection._channel._unsent_bytes < MAX_UNSENT_BYTES + 300 * KIB
        calls[99].cancel()
        held.go.set()
        assert await asyncio.gather(*calls[:99]) == [b"c%d" % n for n in range(99)]
        assert calls[99].cancelled()
        assert await connection.command(5, "last") == b"last"
        await connection.close()


async def test_a_loss_fails_what_was_sent_and_not_what_waited_to_be() -> None:
    """Commands that waited for room go to the next connection."""
    held = HeldReader()
    peers: list[Peer] = []

    async def serve(peer: Peer) -> None:
        peers.append(peer)
        await (held.serve(peer) if len(peers) == 1 else echo(peer))

    async with peer_server(serve) as port, asyncio.timeout(20):
        connection = connection_to(port)
        await connection.command(5, "first")
        calls = [asyncio.ensure_future(connection.command(10, f"c{n}", b"x" * MIB)) for n in range(30)]
        await asyncio.sleep(0.2)
        peers[0].writer.transport.abort()
        results = await asyncio.gather(*calls, return_exceptions=True)
        failed = [isinstance(result, RedisConnectionError) for result in results]
        kept = failed.index(False)
        assert failed == [True] * kept + [False] * (30 - kept)
        assert results[kept:] == [b"c%d" % n for n in range(kept, 30)]
        assert len(peers) == 2
        await connection.close()


@pytest.mark.parametrize(("size", "read_bytes"), [(320 * KIB, 8 * KIB), (8 * MIB, 96 * KIB)])
async def test_a_large_command_may_take_longer_than_its_limit_while_the_peer_takes_it(
    size: int, read_bytes: int
) -> None:
    """[H52] So may those behind it: what times out is silence. The kernel alone may hold all of it."""

    async def serve(peer: Peer) -> None:
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * KIB)
        await peer.command()
        peer.writer.write(b"+ok\r\n")
        taken = 0
        while taken < size:
            taken += len(await peer.reader.read(read_bytes))
            await asyncio.sleep(0.03)
        peer.writer.write(b"+large\r\n+small\r\n")
        await peer.reader.read()

    async with peer_server(serve) as port, asyncio.timeout(20):
        connection = connection_to(port)
        await connection.command(5, "first")
        assert connection._channel is not None
        own = connection._channel._transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 512 * KIB)
        began = time.monotonic()
        large = connection._channel.send(0.25, hiredis.pack_command(("large", b"x" * size)))
        small = connection._channel.send(0.25, hiredis.pack_command(("small",)))
        assert (await large, await small) == (b"large", b"small")
        assert time.monotonic() - began > 0.8
        await connection.close()


async def test_a_peer_that_stops_taking_a_large_command_times_out() -> None:
    """What the kernel took is not what the peer took."""
    held = HeldReader()
    async with peer_server(held.serve) as port, asyncio.timeout(10):
        connection = connection_to(port)
        await connection.command(5, "first")
        for size in (10, MIB, 12 * MIB):
            with pytest.raises(RedisTimeoutError):
                await connection.command(0.3, "large", b"x" * size)
            assert await connection.command(5, "first") == b"ok"
        await connection.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("tls"))


async def test_large_commands_and_replies_pass_through_tls(certificates: Certificates) -> None:
    """TLS has buffers of its own."""

    async def serve(peer: Peer) -> None:
        while True:
            for argument in await peer.command():
                peer.writer.write(bulk(argument))
                await peer.writer.drain()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.cert, certificates.key)
    async with peer_server(serve, tls=context) as port, asyncio.timeout(20):
        connection = connection_to(port, SSLConnection, ssl_ca_certs=str(certificates.ca))
        channel_replies = await asyncio.gather(*(connection.command(5, f"c{n}") for n in range(20)))
        assert channel_replies == [b"c%d" % n for n in range(20)]
        bodies = [bytes([n]) * (3 * MIB + n) for n in range(4)]
        assert await asyncio.gather(*(connection.command(5, body) for body in bodies)) == bodies
        await connection.close()


async def test_a_unix_socket_is_as_good(tmp_path: Path) -> None:
    """Large and small."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await echo(Peer(reader, writer))
        except EOFError:
            writer.close()

    path = str(tmp_path / "socket")
    server = await asyncio.start_unix_server(accept, path)
    async with server, asyncio.timeout(20):
        connection = MultiplexedConnection(
            lambda: UnixDomainSocketConnection(path=path, protocol=2, retry=Retry(NoBackoff(), 0)), 2
        )
        body = b"y" * (3 * MIB)
        assert await asyncio.gather(connection.command(5, body), connection.command(5, "small")) == [body, b"small"]
        await connection.close()

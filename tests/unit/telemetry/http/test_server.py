"""The HTTP server: addresses, signals, limits on its end, exit codes."""

import asyncio
import os
import signal
import socket
from contextlib import closing

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from queue_schemas import BrokerUnavailable, CannotStart
from queue_schemas.addresses import is_loopback
from telemetry.http.server import bind_socket, refuse_unguarded, run_process, run_server, stop_on_signals
from tests.support.waiting import eventually


async def _hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


def test_a_taken_port_is_one_sentence() -> None:
    """Binding a port that somebody listens on says which, and what to change."""
    with closing(bind_socket("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotStart, match=rf"port {port} on 127\.0\.0\.1 is taken .* --router-port"):
            bind_socket("127.0.0.1", port, setting="--router-port")


def test_an_address_of_another_machine_is_one_sentence() -> None:
    """Binding an address that is not ours says so."""
    with pytest.raises(CannotStart, match="is not an address of this machine"):
        bind_socket("192.0.2.1", 0)
    with pytest.raises(CannotStart, match="cannot listen on"):
        bind_socket("no-such-host.invalid", 0)


def test_accepted_sockets_do_not_delay_small_writes() -> None:
    """TCP_NODELAY holds for accepted connections."""
    with closing(bind_socket("127.0.0.1", 0)) as listener:
        listener.setblocking(True)
        with closing(socket.create_connection(listener.getsockname())):
            accepted, _ = listener.accept()
            with closing(accepted):
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


EVERYWHERE = "0.0.0.0"  # noqa: S104 - never bound here


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), (EVERYWHERE, False), ("box", False)],
)
def test_what_counts_as_loopback(host: str, loopback: bool) -> None:
    """Only addresses that no other machine reaches are loopback."""
    assert is_loopback(host) is loopback


def test_a_public_address_needs_a_guard() -> None:
    """A public address without protection is refused, unless told otherwise."""
    with pytest.raises(CannotStart, match=r"refusing to listen on 0\.0\.0\.0.*set a join token.*--insecure"):
        refuse_unguarded(EVERYWHERE, guarded=False, insecure=False, remedy="set a join token")
    refuse_unguarded(EVERYWHERE, guarded=True, insecure=False, remedy="")
    refuse_unguarded(EVERYWHERE, guarded=False, insecure=True, remedy="")
    refuse_unguarded("127.0.0.1", guarded=False, insecure=False, remedy="")


async def test_a_server_serves_until_it_is_stopped() -> None:
    """The server answers, ends when asked, and gives its port back."""
    listener = bind_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    stop = asyncio.Event()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(run_server(_hello, sock=listener, stop=stop, shutdown_timeout_s=1))
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/")).text == "hi"
        stop.set()
        await serving
    bind_socket("127.0.0.1", port).close()


async def test_any_asgi_callable_is_served() -> None:
    """A bound method is an app like any other: its kind is not guessed."""

    class Service:
        async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
            await _hello(scope, receive, send)

    listener = bind_socket("127.0.0.1", 0)
    stop = asyncio.Event()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks, httpx.AsyncClient() as client:
        tasks.create_task(run_server(Service().answer, sock=listener, stop=stop))
        assert (await client.get(f"http://127.0.0.1:{listener.getsockname()[1]}/")).text == "hi"
        stop.set()


async def test_a_running_request_finishes_within_the_limit() -> None:
    """On shutdown a request that is being answered is answered to its end."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await go_on.wait()
        await _hello(scope, receive, send)

    listener = bind_socket("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    stop = asyncio.Event()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks, httpx.AsyncClient() as client:
        tasks.create_task(run_server(slow, sock=listener, stop=stop, shutdown_timeout_s=5))
        request = tasks.create_task(client.get(url))
        await begun.wait()
        stop.set()
        go_on.set()
        assert (await request).text == "hi"


async def test_cancelling_the_server_closes_its_port() -> None:
    """A cancelled server leaves no listener behind."""
    listener = bind_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    serving = asyncio.create_task(run_server(_hello, sock=listener, stop=asyncio.Event()))
    async with asyncio.timeout(10), httpx.AsyncClient() as client:
        await client.get(f"http://127.0.0.1:{port}/")
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    bind_socket("127.0.0.1", port).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_ask_to_stop(number: signal.Signals) -> None:
    """SIGTERM and SIGINT set the event."""
    with stop_on_signals() as stop:
        os.kill(os.getpid(), number)
        async with asyncio.timeout(5):
            await stop.wait()


async def test_a_hangup_asks_to_stop_in_order_and_never_hurries(monkeypatch: pytest.MonkeyPatch) -> None:
    """[H36] A terminal that is closed stops a role or `inferq up` as SIGTERM does, however often it is told."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    hurry = asyncio.Event()
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a parent like nohup ignores it
    try:
        with stop_on_signals(hurry) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            await eventually(stop.is_set, "the hangup is seen")
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            await eventually(hurry.is_set, "the second kind of signal is seen")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert codes == []


async def test_an_ignored_hangup_stays_ignored() -> None:
    """[H36] Under nohup the end of the terminal changes nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_the_second_signal_hurries_and_the_third_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """[G4] Each signal asks for less patience; who has nothing to hand over is ended by the second already."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    hurry = asyncio.Event()
    with stop_on_signals(hurry) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(stop.is_set, "the first is seen")
        assert not hurry.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        await eventually(hurry.is_set, "the second is seen")
        assert codes == []
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: codes == [128 + signal.SIGTERM], "the third is seen")
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(stop.is_set, "the first is seen")
        os.kill(os.getpid(), signal.SIGINT)
        await eventually(lambda: codes[1:] == [128 + signal.SIGINT], "the second is seen")


def test_a_process_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """What a user can correct is one line and exit code 2, also from inside a task group; a clean end is 0."""

    async def refused() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_raise(BrokerUnavailable("Redis is away: start it")))

    async def fine() -> None:
        return None

    async def buggy() -> None:
        raise RuntimeError("bug")

    assert run_process(refused) == 2
    assert capsys.readouterr().err == "inferq: Redis is away: start it\n"
    assert run_process(fine) == 0
    with pytest.raises(RuntimeError, match="bug"):
        run_process(buggy)


async def _raise(error: Exception) -> None:
    raise error

"""Serve an ASGI app with uvicorn: the listening socket, signals, and the exit code of a role's process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Literal, cast

import uvicorn
from starlette.types import ASGIApp

from queue_schemas import CannotStart, InferqError
from queue_schemas.addresses import is_loopback

from ..backoff import EXIT_REFUSED
from ..logs import get_logger
from ..signals import leave_terminal, take_signals
from .connections import ConnectionLimits, Connections, ServeDirectly, protocol_for
from .connections.shared_accept import PauseBeforeAccept, SharedAcceptor

BACKLOG = 2048
GC_THRESHOLD = 10_000
"""New objects after which a process collects garbage."""

log = get_logger(__name__)


def refuse_unguarded(host: str, *, guarded: bool, insecure: bool, remedy: str) -> None:
    """Raise ``CannotStart`` if ``host`` is public and nothing guards it, unless told so by ``insecure``.

    ``remedy`` ends the sentence "... without protection: ".
    """
    if not guarded and not insecure and not is_loopback(host):
        raise CannotStart(
            f"refusing to listen on {host}, which other machines can reach, without protection: "
            f"{remedy}, or say --insecure if the network protects it"
        )


def bind_socket(host: str, port: int, *, setting: str = "--port") -> socket.socket:
    """A listening TCP socket; port 0 takes a free one (``socket.getsockname()[1]``).

    Raises ``CannotStart`` with one sentence if the address cannot be had; ``setting`` names what to change.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise CannotStart(f"cannot listen on {host}: {error}; choose another host") from error
    listener = socket.socket(family, kind, proto)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it: a small write on a reused connection must not wait for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        # Listening here, not later in the server: with SO_REUSEADDR a taken port only shows at this call.
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise CannotStart(_why_not(host, port, error, setting)) from error
    return listener


def _why_not(host: str, port: int, error: OSError, setting: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken by another process: stop it, or choose another port with {setting}"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs more rights than this process has: choose one from 1024 up with {setting}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine: choose another host"
    return f"cannot listen on {host}:{port}: {error.strerror}"


async def run_server(
    app: ASGIApp,
    *,
    sock: socket.socket | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    stop: asyncio.Event | None = None,
    stop_accepting: asyncio.Event | None = None,
    hurry: asyncio.Event | None = None,
    shutdown_timeout_s: float = 10.0,
    lifespan: Literal["on", "off"] = "off",
    limits: ConnectionLimits | None = None,
    pause_before_accept: PauseBeforeAccept | None = None,
    serve_directly: ServeDirectly | None = None,
) -> None:
    """Serve ``app`` until ``stop`` is set; without ``stop``, until SIGTERM or SIGINT.

    Then no connection is accepted, running requests get ``shutdown_timeout_s`` (whole seconds, at least one) to finish,
    and what is left is cancelled; at once when ``hurry`` is set. From ``stop_accepting`` on the listening socket is
    closed, and the connections that are open are served on. ``limits`` bounds what clients may do;
    ``serve_directly`` is offered each request that has arrived whole before ``app`` is. Without ``sock`` binds
    ``host:port`` itself (:func:`bind_socket`). ``pause_before_accept`` is for a ``sock`` that several processes accept
    from (:mod:`.connections.shared_accept`). Cancelling this call closes the port and cuts running requests off.
    """
    protocol: Any = protocol_for(Connections(limits or ConnectionLimits()), serve_directly)  # called like a class
    config = uvicorn.Config(
        app,
        interface="asgi3",
        http=protocol,
        ws="none",
        lifespan=lifespan,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=max(1, round(shutdown_timeout_s)),
    )
    with contextlib.ExitStack() as exits:
        listener = exits.enter_context(sock or bind_socket(host, port))
        stopped = stop or exits.enter_context(stop_on_signals())
        await _serve(_Server(config, pause_before_accept), listener, stopped, stop_accepting, hurry or asyncio.Event())


async def run_beside(
    app: ASGIApp, sock: socket.socket, work: Callable[[asyncio.Event], Coroutine[Any, Any, None]], stop: asyncio.Event
) -> None:
    """Serve ``app``, the health and metrics of a process, while its ``work`` runs: until ``stop`` is set, or either
    ends. ``work`` is given ``stop`` and ends before the server does, so the pages show it shutting down.
    """
    served = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        http = tasks.create_task(run_server(app, sock=sock, stop=served, shutdown_timeout_s=1.0))
        stopping = tasks.create_task(stop.wait())
        working = tasks.create_task(work(stop))
        await asyncio.wait((http, stopping, working), return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        await working
        served.set()


async def _serve(
    server: _Server,
    listener: socket.socket,
    stop: asyncio.Event,
    stop_accepting: asyncio.Event | None,
    hurry: asyncio.Event,
) -> None:
    async def cut_off() -> None:
        await stop.wait()
        await hurry.wait()
        server.force_exit = True

    async def close_listener(asked: asyncio.Event) -> None:
        await asked.wait()
        for part in server.servers:
            part.close()

    try:
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(server.serve(sockets=[listener]), name="http server")
            waiting = tasks.create_task(stop.wait(), name="stop signal")
            closing = tasks.create_task(close_listener(stop_accepting or asyncio.Event()), name="end of accepting")
            hurrying = tasks.create_task(cut_off(), name="end of patience")
            await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True
            waiting.cancel()
            closing.cancel()
            await asyncio.wait((serving,))
            hurrying.cancel()
    finally:
        for part in getattr(server, "servers", ()):
            part.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, pause_before_accept: PauseBeforeAccept | None) -> None:
        super().__init__(config)
        self._pause_before_accept = pause_before_accept

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept as uvicorn does, or from sockets that several processes share."""
        if self._pause_before_accept is None or sockets is None:
            await super().startup(sockets)
            return
        await super().startup([])
        state = self.server_state
        protocol = cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class)
        make = partial(
            protocol,
            config=self.config,
            server_state=state,
            app_state=self.lifespan.state,
        )
        self.servers = [
            SharedAcceptor(listener, make, lambda: len(state.connections), self._pause_before_accept)  # type: ignore[misc]
            for listener in sockets
        ]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's business (:func:`stop_on_signals`): several servers may share one."""
        yield


@contextlib.contextmanager
def stop_on_signals(hurry: asyncio.Event | None = None) -> Iterator[asyncio.Event]:
    """An event set by the first SIGTERM or SIGINT. The second sets ``hurry``: give up waiting, hand over, end. The one
    after that (without ``hurry``, the second) ends the process at once. A SIGHUP, as of a terminal that is closed,
    asks to stop too, unless it is ignored. For the main thread."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if not stop.is_set():
            log.info("stopping", signal=number.name)
            stop.set()
        elif hurry is not None and not hurry.is_set():
            log.warning("stopping_without_delay", signal=number.name, then="one more signal ends it at once")
            hurry.set()
        else:
            log.warning("stopped_at_once", signal=number.name)
            os._exit(128 + number)

    def on_hangup() -> None:
        leave_terminal()
        if not stop.is_set():  # a shell and the kernel may both tell of one hangup: it never hurries
            on_signal(signal.SIGHUP)

    numbers = [signal.SIGTERM, signal.SIGINT]
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # what nohup is for
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
        numbers.append(signal.SIGHUP)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def run_process(main: Callable[[], Awaitable[None]]) -> int:
    """Run ``main`` on uvloop and give the process's exit code (:func:`exit_code_of`)."""

    def run() -> None:
        take_signals()
        run_loop(main)

    return exit_code_of(run)


def run_loop(main: Callable[[], Awaitable[None]]) -> None:
    """Run ``main`` on uvloop, with the garbage collector set for a process that serves."""

    async def run() -> None:
        await main()

    # What was imported stays: the collector need not look at it again. Requests leave little that only it can free.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    if sys.platform == "win32":
        asyncio.run(run())
    else:
        import uvloop  # noqa: PLC0415 - not to be had on Windows

        uvloop.run(run())


def _complain(sentence: str) -> None:
    sys.stderr.write(f"inferq: {sentence}\n")


def exit_code_of(run: Callable[[], None], refuse: Callable[[str], None] = _complain) -> int:
    """Call ``run`` and give the process's exit code.

    0 after a clean end; 2 for an :class:`InferqError`, which is something the user can correct: ``refuse`` gets its
    sentence, for standard error. Anything else is a bug and leaves its traceback.
    """
    try:
        run()
    except (InferqError, BaseExceptionGroup) as error:
        fixable = _fixable(error)
        if fixable is None:
            raise
        refuse(str(fixable))
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return 130
    return 0


def _fixable(error: BaseException) -> InferqError | None:
    """The one error to tell of; None if a bug is among them."""
    if isinstance(error, BaseExceptionGroup):
        inner = [_fixable(part) for part in error.exceptions]
        return None if None in inner else inner[0]
    return error if isinstance(error, InferqError) else None

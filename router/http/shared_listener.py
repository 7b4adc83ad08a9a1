"""One listening socket for all Routers of a fabric on one machine, so that Routers are replaced under load.

The first Router binds it; later ones receive the same socket (not another one on the same port) over a unix socket.
They share its accept queue: connections that a leaving or killed Router has not accepted stay for the others, and the
port stays open while one of them runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from queue_schemas import CannotStart
from telemetry import get_logger
from telemetry.http.server import bind_socket

HAND_OVER_TIMEOUT_S = 2.0
LOCK_TIMEOUT_S = 15.0
"""Longer than it takes to ask several sharers that all hang."""
LOCK_PAUSE_S = 0.02
_GREETING = b"inferq"

log = get_logger(__name__)


class SharedListener:
    """The address ``host:port`` of the fabric ``fabric``; use it as ``async with``.

    ``listener`` is the socket, for a server to accept from and close. Entering raises ``CannotStart`` if the address is
    taken by something else.
    """

    listener: socket.socket

    def __init__(self, fabric: str, host: str, port: int, *, folder: Path | None = None) -> None:
        self.host, self.port = host, port
        self._folder = folder or Path(tempfile.gettempdir()) / f"inferq-listeners-{os.getuid()}"
        self._name = f"{fabric}-{port}"
        self._path = self._folder / f"{self._name}.{secrets.token_hex(4)}"
        self._offer: socket.socket | None = None
        self._shared: socket.socket | None = None

    async def __aenter__(self) -> Self:
        self._offer = await asyncio.to_thread(self._open)
        asyncio.get_running_loop().add_reader(self._offer, self._hand_over)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self.listener.close()

    def close(self) -> None:
        """Stop handing the socket over; ``listener`` stays open. Can be repeated."""
        offer, shared, self._offer, self._shared = self._offer, self._shared, None, None
        if offer is not None and shared is not None:
            asyncio.get_running_loop().remove_reader(offer)
            self._path.unlink(missing_ok=True)
            offer.close()
            shared.close()

    def _open(self) -> socket.socket:
        _make_private(self._folder)
        offer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(offer.close)
            with self._locked():
                shared = self._shared_by_others()
                self.listener = shared or bind_socket(self.host, self.port)
                on_failure.callback(self.listener.close)
                if shared is not None:
                    self._check_address(shared)
                self._shared = self.listener.dup()
                offer.bind(str(self._path))
                offer.listen()
                offer.setblocking(False)
            on_failure.pop_all()
        return offer

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time: two that start together must not both find nobody there."""
        until = time.monotonic() + LOCK_TIMEOUT_S
        with (self._folder / f"{self._name}.lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise CannotStart(
                            f"another router has been opening port {self.port} for {LOCK_TIMEOUT_S:g} s and does not "
                            f"finish: it holds {self._folder / self._name}.lock; stop it"
                        ) from None
                time.sleep(LOCK_PAUSE_S)
            yield

    def _check_address(self, shared: socket.socket) -> None:
        """Raise ``CannotStart`` if the others listen on another address than we are to."""
        theirs = shared.getsockname()[0]
        ours = {address[0] for *_, address in socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)}
        if theirs not in ours:
            raise CannotStart(
                f"the routers of this fabric listen on {theirs}, port {self.port}, and this one "
                f"is configured for {self.host}: "
                "a new host needs a new port, or all of them stopped first"
            )

    def _shared_by_others(self) -> socket.socket | None:
        for path in self._folder.glob(f"{self._name}.*"):
            if path.suffix == ".lock":
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
                asking.settimeout(HAND_OVER_TIMEOUT_S)
                try:
                    asking.connect(str(path))
                    _, descriptors, _, _ = socket.recv_fds(asking, len(_GREETING), 1, socket.MSG_CMSG_CLOEXEC)
                except (ConnectionRefusedError, FileNotFoundError):
                    path.unlink(missing_ok=True)  # left behind by one that was killed
                    continue
                except OSError as error:
                    log.warning("listener_not_shared", path=str(path), error=str(error))
                    continue
            if descriptors:
                shared = socket.socket(fileno=descriptors[0])
                # All share one flag: an object that believes in blocking would, when duplicated, block the others.
                shared.setblocking(False)
                return shared
        return None

    def _hand_over(self) -> None:
        if self._offer is None or self._shared is None:
            return
        try:
            asking, _ = self._offer.accept()
        except OSError:  # the other Router has gone
            return
        with asking:
            try:
                socket.send_fds(asking, [_GREETING], [self._shared.fileno()])
            except OSError as error:
                log.warning("listener_not_shared", error=str(error))


def _make_private(folder: Path) -> None:
    """Other users must not be able to hand us their socket."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise CannotStart(f"{folder} must be a folder that only this user can enter: remove it, or correct its rights")

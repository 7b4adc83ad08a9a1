"""The parent of several Router processes: starts them, starts them again, stops them, and adds up their metrics.

It is forked before any of them has a loop or a thread, so they share the memory of what was imported, and a new one
starts in milliseconds. All accept from the one listening socket that they inherit (ADR 25).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from queue_schemas import CannotStart
from telemetry import MetricsRegistry, get_logger
from telemetry.backoff import Restarts
from telemetry.signals import leave_terminal

from .merged_metrics import Snapshot, merge_snapshots, take_snapshot, what_stays
from .messages import Kind, MessageReader, pack

COLLECT_TIMEOUT_S = 1.0
"""How long a scrape waits for a process; then its last known figures count."""
COLLECT_INTERVAL_S = 10.0
MAX_UNANSWERED = 3
"""A process that leaves so many requests for its figures unanswered, one each interval, hangs and is replaced."""
_READ_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1

log = get_logger("router.processes")

RunChild = Callable[[int, socket.socket], int]


@dataclass(slots=True, eq=False)
class _Process:
    """One of the processes, over all its starts."""

    number: int
    history: Restarts = field(default_factory=Restarts)
    start_at_s: float | None = 0.0
    """When to start it; None while it runs and once it is to stay down."""
    pid: int = 0
    """0 while it does not run."""
    started_s: float = 0.0
    channel: socket.socket | None = None
    reader: MessageReader = field(default_factory=MessageReader)
    unsent: bytearray = field(default_factory=bytearray)
    ready: bool = False
    refusal: str = ""
    unanswered: int = 0
    figures: Snapshot = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Scrape:
    """A process that waits for the figures of all."""

    asked_by: _Process
    missing: set[int]
    """Process ids that have not reported since."""
    until_s: float


class Supervisor:
    """Keeps ``count`` processes running; ``run_child(number, channel)`` is what each does, and gives its exit code.
    ``note_end(number)`` is called when one has ended.

    ``stop_limit_s`` is the longest time from SIGTERM to a process's end: then it is killed. ``lowest`` names the gauges
    of which the lowest value counts for all.
    """

    def __init__(
        self,
        count: int,
        listener: socket.socket,
        run_child: RunChild,
        note_end: Callable[[int], None],
        *,
        stop_limit_s: float,
        lowest: frozenset[str] = frozenset(),
    ) -> None:
        self._processes = [_Process(number) for number in range(1, count + 1)]
        self._listener = listener
        self._run_child = run_child
        self._note_end_of = note_end
        self._stop_limit_s = stop_limit_s
        self._lowest = lowest
        self._selector = selectors.DefaultSelector()
        self._scrapes: list[_Scrape] = []
        self._ended_figures: Snapshot = []
        self._collect_at_s = time.monotonic() + COLLECT_INTERVAL_S
        self._signals = 0
        self._kill_at_s = float("inf")
        self._failure = ""
        self._registry = MetricsRegistry("router")
        self._registry.watch_gauge("inferq_router_processes", "Processes of this Router that accept", self._accepting)
        self._restarts = self._registry.counter(
            "inferq_router_process_restarts_total", "Processes of this Router that ended and were started again"
        )

    def run(self) -> None:
        """Return once a signal has ended all processes in good order. A second signal hurries them, a third ends all at
        once. Raises ``CannotStart`` if one cannot be kept running."""
        with contextlib.closing(self._selector), self._on_signals():
            while any(process.pid or process.start_at_s is not None for process in self._processes):
                self._start_due()
                for key, events in self._selector.select(self._pause_s()):
                    key.data(events)
                self._reap()
                self._keep_time()
        if self._failure:
            raise CannotStart(self._failure)

    def _accepting(self) -> int:
        return sum(process.ready for process in self._processes)

    def _pause_s(self) -> float:
        times = [process.start_at_s for process in self._processes if process.start_at_s is not None]
        times += [scrape.until_s for scrape in self._scrapes]
        return max(0.0, min([*times, self._collect_at_s, self._kill_at_s]) - time.monotonic())

    # --- processes ---

    def _start_due(self) -> None:
        for process in self._processes:
            if process.start_at_s is not None and process.start_at_s <= time.monotonic():
                self._start(process)

    def _start(self, process: _Process) -> None:
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            ours, theirs = socket.socketpair()
            pid = os.fork()
        except OSError as error:  # no memory, process ids or file descriptors
            log.error("process_not_started", number=process.number, error=str(error))
            self._start_again(process, 1, 0.0, ready=False)
            return
        if pid == 0:
            self._become(process, ours, theirs, parent)
        theirs.close()
        ours.setblocking(False)
        process.pid, process.channel, process.started_s, process.start_at_s = pid, ours, time.monotonic(), None
        process.reader, process.unanswered = MessageReader(), 0
        process.unsent.clear()
        self._selector.register(ours, selectors.EVENT_READ, lambda events: self._exchange(process, events))

    def _become(self, process: _Process, ours: socket.socket, theirs: socket.socket, parent: int) -> None:
        """Be that process; never returns."""
        code = 1
        try:
            _die_with(parent)
            signal.set_wakeup_fd(-1)
            ours.close()
            for other in self._processes:
                if other.channel is not None:
                    other.channel.close()
            self._selector.close()
            code = self._run_child(process.number, theirs)
        except BaseException:  # noqa: BLE001 - the parent's stack is not this process's to unwind
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        for process in self._processes:
            if not process.pid:
                continue
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if pid:
                self._receive(process)  # its last figures, and why it refused to start
                self._note_end(process, os.waitstatus_to_exitcode(status))

    def _note_end(self, process: _Process, code: int) -> None:
        pid, process.pid = process.pid, 0
        ready, process.ready = process.ready, False
        self._close_channel(process)
        self._note_end_of(process.number)
        self._ended_figures = merge_snapshots([self._ended_figures, what_stays(process.figures)], lowest=self._lowest)
        process.figures = []
        self._heard_from(pid)
        if self._signals or self._failure:
            return
        log.error("process_ended", number=process.number, pid=pid, code=code)
        self._start_again(process, code, time.monotonic() - process.started_s, ready=ready)

    def _start_again(self, process: _Process, code: int, ran_s: float, *, ready: bool) -> None:
        process.history, pause_s = process.history.ended(code, ran_s, ready=ready)
        if pause_s is None:
            self._give_up(process, code)
            return
        self._restarts.inc()
        process.start_at_s = time.monotonic() + pause_s

    def _give_up(self, process: _Process, code: int) -> None:
        self._failure = process.refusal or (
            f"process {process.number} of the router cannot be kept running: it ended {process.history.in_a_row} times "
            f"in a row, at last with code {code}; its log lines say why"
        )
        self._stop()

    def _close_channel(self, process: _Process) -> None:
        if process.channel is not None:
            self._selector.unregister(process.channel)
            process.channel.close()
            process.channel = None

    # --- the end ---

    @contextlib.contextmanager
    def _on_signals(self) -> Iterator[None]:
        """Have signals wake the loop: it carries them out between two messages."""
        woken, wake = socket.socketpair()
        woken.setblocking(False)
        wake.setblocking(False)
        stops = {signal.SIGTERM, signal.SIGINT}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # what nohup is for
            stops.add(signal.SIGHUP)

        def on_wake(_events: int) -> None:
            with contextlib.suppress(BlockingIOError):
                for number in woken.recv(_READ_BYTES):
                    if number in stops:
                        self._on_stop_signal(signal.Signals(number))

        before = {number: signal.signal(number, lambda *_: None) for number in (*stops, signal.SIGCHLD)}
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._selector.register(woken, selectors.EVENT_READ, on_wake)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            woken.close()
            wake.close()

    def _on_stop_signal(self, number: signal.Signals) -> None:
        if number is signal.SIGHUP:
            leave_terminal()
            self._send_all(Kind.HANGUP)
            if self._signals:  # a shell and the kernel may both tell of one hangup: it never hurries
                return
        self._signals += 1
        if self._signals == 1:
            log.info("stopping", signal=number.name)
            self._stop()
        elif self._signals == 2:
            log.warning("stopping_without_delay", signal=number.name, then="one more signal ends it at once")
            self._send_all(Kind.HURRY)
        else:
            log.warning("stopped_at_once", signal=number.name)
            self._kill_all()

    def _stop(self) -> None:
        # From here on the processes alone hold the port: it closes with the last of them.
        self._listener.close()
        for process in self._processes:
            process.start_at_s = None
        self._kill_at_s = time.monotonic() + self._stop_limit_s
        self._send_all(Kind.STOP)

    def _kill_all(self) -> None:
        for process in self._processes:
            if process.pid:
                os.kill(process.pid, signal.SIGKILL)

    # --- messages ---

    def _exchange(self, process: _Process, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._send(process, b"")
        if events & selectors.EVENT_READ:
            self._receive(process)

    def _receive(self, process: _Process) -> None:
        """Carry out what the process has said so far."""
        try:
            while process.channel is not None and (data := process.channel.recv(_READ_BYTES)):
                for kind, values in process.reader.feed(data):
                    self._obey(process, kind, values)
        except BlockingIOError:
            return
        except ConnectionError:
            pass
        self._close_channel(process)  # it has ended, or is about to

    def _obey(self, process: _Process, kind: Kind, values: list[Any]) -> None:
        match kind:
            case Kind.READY:
                process.ready = True
            case Kind.REFUSED:
                process.refusal = values[0]
            case Kind.FIGURES:
                process.figures, process.unanswered = values[0], 0
                self._heard_from(process.pid)
            case Kind.SCRAPE:
                process.figures, process.unanswered = values[0], 0
                self._scrape(process)
            case _:
                raise ValueError(f"process {process.number} of the router sent what only its parent sends: {kind}")

    def _scrape(self, process: _Process) -> None:
        others = [other for other in self._processes if other.channel is not None and other is not process]
        for other in others:
            self._send(other, pack(Kind.COLLECT))
        until_s = time.monotonic() + COLLECT_TIMEOUT_S
        self._scrapes.append(_Scrape(process, {other.pid for other in others}, until_s))
        self._answer_scrapes()

    def _heard_from(self, pid: int) -> None:
        for scrape in self._scrapes:
            scrape.missing.discard(pid)
        self._answer_scrapes()

    def _answer_scrapes(self) -> None:
        now = time.monotonic()
        due = [scrape for scrape in self._scrapes if not scrape.missing or scrape.until_s <= now]
        if not due:
            return
        self._scrapes = [scrape for scrape in self._scrapes if scrape not in due]
        figures = [process.figures for process in self._processes]
        merged = merge_snapshots([take_snapshot(self._registry), self._ended_figures, *figures], lowest=self._lowest)
        for scrape in due:
            self._send(scrape.asked_by, pack(Kind.MERGED, merged))

    def _send_all(self, kind: Kind) -> None:
        for process in self._processes:
            self._send(process, pack(kind))

    def _send(self, process: _Process, message: bytes) -> None:
        """Send what is unsent and ``message``; what does not fit now follows when the process reads."""
        if process.channel is None:
            return
        process.unsent += message
        try:
            del process.unsent[: process.channel.send(process.unsent)]
        except BlockingIOError:
            pass
        except ConnectionError:
            return  # it has ended: :meth:`_reap` finds that
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.unsent else 0)
        self._selector.modify(process.channel, events, lambda events: self._exchange(process, events))

    # --- time ---

    def _keep_time(self) -> None:
        now = time.monotonic()
        self._answer_scrapes()
        if now >= self._collect_at_s:
            self._collect_at_s = now + COLLECT_INTERVAL_S
            self._collect()
        if now >= self._kill_at_s:
            self._kill_at_s = float("inf")
            log.error("processes_killed", after_s=self._stop_limit_s)
            self._kill_all()

    def _collect(self) -> None:
        """Ask for figures now and then: a killed process takes only what it counted since along; and a process that
        never answers hangs."""
        for process in self._processes:
            if not process.pid:
                continue
            if process.unanswered >= MAX_UNANSWERED:
                log.error("process_hangs", number=process.number, pid=process.pid)
                os.kill(process.pid, signal.SIGKILL)
                continue
            process.unanswered += 1
            self._send(process, pack(Kind.COLLECT))


def _die_with(parent: int) -> None:
    """Be killed when the parent is: nobody would start this process again, and it would hold the port."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent is gone")

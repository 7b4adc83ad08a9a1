"""Workers by an operator's own program: JSON on its standard input, JSON on its standard output, one step a run.

Input: ``{"version": 1, "action": "list" | "scale_to" | "remove", "pool": "M", "count": 3, "workers": ["id", ...]}``.
``count`` is with ``scale_to`` how many workers are to run, ``workers`` with ``remove`` the ones to end: they are
drained by then. The answer to each action is ``{"workers": ["id", ...]}``: the ids of all workers that run or start
then, as they register themselves (``--worker-id``). Exit code 0, or the last line of standard error says why not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from queue_schemas import BadMessage, check_worker_id
from scheduling.autoscale import MAX_REPLICAS

from ..settings import AutoscaleSettings
from .port import DriverFailed

MAX_OUTPUT_BYTES = 1 << 20
_MAX_WORDS = 300
_READ_BYTES = 1 << 16
_LAST_WORDS_S = 1.0


class CommandDriver:
    """Runs the program once for each step, one step at a time, within ``driver_timeout``."""

    drains = False
    outdated: frozenset[str] = frozenset()

    def __init__(self, settings: AutoscaleSettings) -> None:
        self._settings = settings

    async def workers(self) -> frozenset[str]:
        return await self._step("list")

    async def scale_to(self, count: int) -> None:
        await self._step("scale_to", count=count)

    async def remove(self, worker_ids: Sequence[str]) -> None:
        await self._step("remove", workers=list(worker_ids))

    def removable(self, ordered: Sequence[str], count: int) -> Sequence[str]:
        return ordered[:count]

    async def close(self) -> None:
        """Nothing is open."""

    async def _step(self, action: str, **more: object) -> frozenset[str]:
        """The workers that the program names. Raises ``DriverFailed``."""
        name = f"the program {self._settings.args[0]!r} ({action})"
        order = {"version": 1, "action": action, "pool": self._settings.pool, **more}
        limit_s = self._settings.driver_timeout / 1000
        try:
            async with asyncio.timeout(limit_s):
                code, output, words = await _run(self._settings.args, json.dumps(order).encode())
        except TimeoutError as error:
            raise DriverFailed(f"{name} did not end within {limit_s:g} s and was killed") from error
        except OSError as error:
            raise DriverFailed(f"{name} cannot be started: {error.strerror or error}") from error
        if code != 0:
            lines = words.decode("utf-8", "replace").strip().splitlines()
            raise DriverFailed(f"{name} ended with code {code}: {(lines or ['it said nothing'])[-1][:_MAX_WORDS]}")
        if len(output) > MAX_OUTPUT_BYTES:
            raise DriverFailed(f"{name} wrote more than {MAX_OUTPUT_BYTES} bytes to standard output")
        return _workers(name, output)


async def _run(command: Sequence[str], order: bytes) -> tuple[int, bytes, bytes]:
    """Run ``command`` with ``order`` on its standard input: its exit code, the first bytes of its standard output and
    the last ones of its standard error. Kills it, with its process group, when cancelled."""
    async with _pipe(MAX_OUTPUT_BYTES + 1) as output, _pipe(_READ_BYTES, keep_last=True) as words:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=output.write_end, stderr=words.write_end, start_new_session=True
        )
        try:
            output.close_write_end()
            words.close_write_end()
            with contextlib.suppress(ConnectionError):  # a program need not read what it is told
                await process.communicate(order)
            code = await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        # Workers that it has started may hold the pipes for as long as they live.
        await asyncio.wait((output.reading, words.reading), timeout=_LAST_WORDS_S)
        return code, bytes(output.kept), bytes(words.kept)


@dataclass(slots=True)
class _Pipe:
    """One that is read while it is open. (Those of a subprocess are closed by asyncio when their other ends are.)"""

    write_end: int
    kept: bytearray
    reading: asyncio.Task[None]

    def close_write_end(self) -> None:
        """Ours: the program has its own."""
        write_end, self.write_end = self.write_end, -1
        if write_end >= 0:
            os.close(write_end)


@asynccontextmanager
async def _pipe(limit: int, *, keep_last: bool = False) -> AsyncIterator[_Pipe]:
    """A pipe of which the first or last ``limit`` bytes are kept."""
    stream = asyncio.StreamReader()
    read_end, write_end = os.pipe()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read_end, "rb", buffering=0)
    )
    kept = bytearray()
    pipe = _Pipe(write_end, kept, asyncio.create_task(_read(stream, kept, limit, keep_last), name="output of a driver"))
    try:
        yield pipe
    finally:
        pipe.reading.cancel()
        pipe.close_write_end()
        transport.close()


async def _read(stream: asyncio.StreamReader, into: bytearray, limit: int, keep_last: bool) -> None:
    while piece := await stream.read(_READ_BYTES):
        into += piece
        if keep_last:
            del into[: max(0, len(into) - limit)]
        else:
            del into[limit:]


def _workers(name: str, output: bytes) -> frozenset[str]:
    try:
        answer: Any = json.loads(output)
        named = answer["workers"]
        if type(named) is not list or len(named) > MAX_REPLICAS:
            raise DriverFailed(f'{name} must answer {{"workers": [ids]}}, with {MAX_REPLICAS} ids at most')
        return frozenset(check_worker_id(str(worker_id)) for worker_id in named)
    except BadMessage as error:
        raise DriverFailed(f"{name} names a worker wrongly: {error.message}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DriverFailed(f'{name} must answer {{"workers": [ids]}} in JSON on standard output') from error

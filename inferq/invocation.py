"""How a command meets its context: inherited signals, closed or broken output, and its exit code.

A parent may have made any of it: ``nohup`` and background jobs of scripts ignore SIGINT, service managers start without
standard streams, and ``| head`` stops reading.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from queue_schemas import BadRequest, InferqError
from telemetry.signals import take_signals
from telemetry.variables import drop_blank

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""As a shell shows a program that SIGPIPE ended."""
EXIT_REFUSED = 2
_LOOK_S = 0.2


def run_command(command: Callable[[], object]) -> int:
    """Run ``command`` and give the exit code of the process; it is the only thing that this process does."""
    open_streams()
    take_signals()
    drop_blank()
    code, output = EXIT_REFUSED, sys.stdout
    try:
        command()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
        if sys.stdout is not output:  # how the command-line library says that the pipe broke
            code = EXIT_BROKEN_PIPE
    except InferqError as error:
        sys.stderr.write(f"inferq: {error.message}\n")
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_output()
        sys.stderr.write(f"inferq: the output cannot be written: {error.strerror}\n")
    return _flushed(code)


def open_streams() -> None:
    """Open standard streams that the parent has closed, so that no other file takes their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse text that is not in the encoding of this terminal, as no request can carry it. Raises ``BadRequest``.

    Names of files that are there pass: they may be any bytes.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            if not os.path.lexists(argument):
                raise BadRequest(
                    f"{os.fsencode(argument)[:60]!r} is not text in {sys.getfilesystemencoding()}: give it in that "
                    "encoding, or set LC_ALL=C.UTF-8 where the terminal writes UTF-8"
                ) from None


async def pause(seconds: float) -> None:
    """Wait so long. Raises ``BrokenPipeError`` as soon as the reader of standard output has gone."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if reader_left():
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        await asyncio.sleep(min(left, _LOOK_S))


def reader_left() -> bool:
    """Whether standard output is a pipe or socket whose reader has left."""
    with suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return False


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return code or EXIT_BROKEN_PIPE
    except OSError as error:
        _discard_output()
        sys.stderr.write(f"inferq: the output cannot be written: {error.strerror}\n")
        return code or EXIT_REFUSED
    return code


def _discard_output() -> None:
    """Send what is still buffered nowhere: Python would complain once more at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

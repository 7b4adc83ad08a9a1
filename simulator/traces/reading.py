"""Read a trace: a file of a known kind, or a generator's specification."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from heapq import merge
from itertools import islice
from operator import attrgetter
from pathlib import Path

from queue_schemas import BadRequest

from ..requests import TraceRequest

COPIES_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Trace:
    """``requests()`` gives the requests anew each time, by rising time. A block of a prompt has ``block_tokens``
    tokens."""

    name: str
    requests: Callable[[], Iterable[TraceRequest]]
    block_tokens: int = 512

    def scaled(self, *, speed: float = 1.0, limit: int | None = None, copies: int = 1) -> Trace:
        """The first ``limit`` requests, ``speed`` times as fast, ``copies`` times: each copy a little later, all within
        ``COPIES_WITHIN_S``, so that the load keeps its shape, and with blocks of its own."""
        requests = self.requests
        if limit is not None:
            requests = partial(_first, requests, limit)
        if copies > 1:
            requests = partial(_copied, requests, copies)
        if speed != 1.0:
            requests = partial(_sped_up, requests, speed)
        return replace(self, requests=requests)


def _first(requests: Callable[[], Iterable[TraceRequest]], limit: int) -> Iterator[TraceRequest]:
    return islice(requests(), limit)


def _sped_up(requests: Callable[[], Iterable[TraceRequest]], speed: float) -> Iterator[TraceRequest]:
    return (request._replace(at_s=request.at_s / speed) for request in requests())


def _copied(requests: Callable[[], Iterable[TraceRequest]], copies: int) -> Iterator[TraceRequest]:
    def copy(number: int) -> Iterator[TraceRequest]:
        later_s = COPIES_WITHIN_S * number / copies
        for request in requests():
            blocks = tuple(block * copies + number for block in request.blocks)
            yield request._replace(at_s=request.at_s + later_s, blocks=blocks)

    return merge(*(copy(number) for number in range(copies)), key=attrgetter("at_s"))


class MalformedLine(BadRequest):
    """A line of a trace is not what its kind has. The message names file, line and field."""

    def __init__(self, path: Path, line: int, problem: str) -> None:
        super().__init__(f"{path}, line {line}: {problem}")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, unpacked where its name ends in ``.gz``, numbered from 1; empty ones are left out.

    Raises ``BadRequest`` where it cannot be read.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line := line.strip():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise BadRequest(f"{path} cannot be read as a trace: {error}") from error


def in_order(path: Path, numbered: Iterable[tuple[int, TraceRequest]]) -> list[TraceRequest]:
    """The requests of a file, checked: counts are positive and times do not fall. Times begin at 0.

    Raises :class:`MalformedLine` for the first that is not, and ``BadRequest`` where there is none at all.
    """
    found: list[TraceRequest] = []
    began_at = latest = 0.0
    for line, request in numbered:
        if not found:
            began_at = latest = request.at_s
        if request.at_s < latest:
            raise MalformedLine(path, line, "its time lies before that of the line above: sort the trace by time")
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise MalformedLine(path, line, "a request has at least one prompt token and one output token")
        latest = request.at_s
        found.append(request._replace(at_s=latest - began_at))
    if not found:
        raise BadRequest(f"{path} has no requests")
    return found

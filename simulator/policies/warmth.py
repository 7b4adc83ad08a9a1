"""Prefix affinity in the simulated queue: which worker's cache holds a request's prefix, by ``scheduling.affinity``."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Sequence
from functools import lru_cache

from scheduling.affinity import (
    CHUNK_BYTES,
    DIGEST_CHARS,
    LOOKAHEAD,
    SAMPLED_CHUNKS,
    WarmTable,
    choose,
    holds,
    patience_ms,
    takes_warm,
)

from ..fleet import Worker
from ..requests import Request

BYTES_PER_TOKEN = 4
"""What turns a trace's tokens into the bytes in which a Router counts chunks."""


class Warmth:
    """What the queue knows of caches. Traces have blocks of ``block_tokens``; a digest of a chunk is that of the last
    block within it."""

    def __init__(self, block_tokens: int) -> None:
        self._table = WarmTable()
        self._workers: dict[str, Worker] = {}
        ends = {chunk * CHUNK_BYTES // (block_tokens * BYTES_PER_TOKEN) for chunk in SAMPLED_CHUNKS}
        self._sampled = [end - 1 for end in sorted(ends) if end]

    def digests(self, request: Request) -> str:
        """As a Router makes them, the longest prefix first."""
        blocks = request.blocks
        if not blocks:
            return ""
        known = [place for place in self._sampled if place < len(blocks)]
        return "".join(_digest(request.tenant, blocks[place]) for place in reversed(known))

    def warmest(self, digests: str, best: Worker) -> Worker:
        """The worker that a request is handed to where nothing waits: ``best`` has the lowest load."""
        match = self._table.match(digests) if digests else None
        if match is None:
            return best
        holders = (self._workers[holder.partition("#")[0]] for holder in match.holders)
        warm = [
            worker
            for worker in holders
            if worker.ready
            and not worker.leaving
            and holds(match.holders, _cache(worker))
            and takes_warm(match, _free(worker), worker.slots, _free(best), best.slots)
        ]
        return max(warm, key=_free, default=best)

    def remember(self, digests: str, worker: Worker) -> None:
        """A request with ``digests`` runs on ``worker``."""
        if digests:
            self._workers[f"{worker.number}"] = worker
            self._table.remember(digests, _cache(worker))

    def chosen(self, waiting: Iterable[str], worker: Worker) -> int:
        """Which of the requests that wait, given as their digests in fair order, ``worker`` takes."""
        found: Sequence[str] = [digests for digests, _ in zip(waiting, range(LOOKAHEAD), strict=False)]
        return choose(self._table, found, _cache(worker))


def _free(worker: Worker) -> int:
    return worker.slots - worker.running


def _cache(worker: Worker) -> str:
    return f"{worker.number}#{worker.cache}"


class Patience:
    """How long the first request of a line is overtaken by warm ones; times are in seconds."""

    __slots__ = ("_longest_ms",)

    def __init__(self) -> None:
        self._longest_ms = 0

    def waits(self, digests: str) -> None:
        """A request joined the line."""
        if digests and not self._longest_ms:
            self._longest_ms = 1

    def left(self, waited_s: float) -> None:
        """A request left the line."""
        self._longest_ms = patience_ms(self._longest_ms, int(waited_s * 1e3))

    def lasts(self, waited_s: float) -> bool:
        """Whether one that has waited so long may be overtaken."""
        return waited_s * 1e3 < self._longest_ms


@lru_cache(maxsize=1 << 18)
def _digest(tenant: str, block: int) -> str:
    """Ids of blocks stand for everything up to there, as digests do."""
    size = DIGEST_CHARS * 3 // 4
    return urlsafe_b64encode(hashlib.blake2b(f"{tenant} {block}".encode(), digest_size=size).digest()).decode()

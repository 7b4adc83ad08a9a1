"""Find the worker whose engine holds a request's prefix in its cache.

A Router reads a request's prefix as digests (:func:`prefix_digests`), the longest prefix first. The queue keeps a
bounded table of who was leased a job with a digest last (:class:`WarmTable`), prefers such a worker where its load is
within a bound (:func:`takes_warm`), and lets a worker that claims take a warm job before others until the one at the
head has waited as long as any did of late (:func:`choose`, :func:`patience_ms`).

``broker/lua/lib/affinity.lua`` does what the functions behind :func:`prefix_digests` say, with the constants of this
module; the contract tests compare the two.
"""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson

from queue_schemas.records import record

CHUNK_BYTES = 1024
"""Prompt text between two digests at the start of a prompt: about 256 tokens, sixteen blocks of vLLM's cache."""
DENSE_CHUNKS = 16
"""So many chunks have a digest each; behind them there are half as many in each doubling of the length."""
MAX_DIGESTS = 64
"""Of one request, its session and its adapter included. They cover the first 800 kB of a prompt."""
DIGEST_CHARS = 12
"""72 bits in base64. The first ``SLOT_CHARS`` characters are the slot in the table, the others prove the match."""
SLOT_CHARS = 3
"""2^18 slots: what the table of a shard can hold, whatever clients send."""
MAX_HOLDERS = 4
"""Workers that a digest is remembered of, the latest first."""
LOOKAHEAD = 16
"""Waiting jobs of one tenant that a claim compares, and the longest prefixes of each that it looks at."""
PATIENCE_JOBS = 128
"""The longest wait of late fades with jobs that waited less: each takes off such a part of the difference."""

_DIGEST_BYTES = DIGEST_CHARS * 3 // 4
_PROMPT_FIELDS = ("tools", "system", "instructions", "messages", "prompt", "input")
"""Where a prompt stands in a body, in the order in which chat templates put it before the model."""


_ABSENT: tuple[Any, ...] = (None, [])


def _sampled_chunks() -> tuple[int, ...]:
    """The chunks, counted from 1, at whose end a digest is taken: all at first, then ever farther apart."""
    chunks: list[int] = []
    step = 1
    while len(chunks) < MAX_DIGESTS - 2:
        chunks.append((chunks[-1] if chunks else 0) + step)
        if chunks[-1] == DENSE_CHUNKS * step:
            step *= 2
    return tuple(chunks)


SAMPLED_CHUNKS = _sampled_chunks()


def prefix_digests(tenant: str, model: str, request: Mapping[str, Any], session: str = "") -> str:
    """The digests of a request in the body ``request``, joined, the longest prefix first; '' for one that has none.

    ``session`` is the client's name for a conversation (a ``prompt_cache_key`` counts as one, too): it goes before any
    prefix. Each digest is of the tenant, the model and everything before it, as vLLM chains its blocks
    (https://docs.vllm.ai/en/latest/design/prefix_caching.html): equal digests mean equal prefixes of one tenant. What
    follows a prefix, sampling parameters, white space and the order of the body's fields do not change it.
    """
    found: list[bytes] = []
    try:
        text = b"".join([orjson.dumps(part) for name in _PROMPT_FIELDS if (part := request.get(name)) not in _ABSENT])
    except orjson.JSONEncodeError:
        text = b""  # orjson writes less deeply nested values than it reads
    chain, done = _seed(tenant, model).copy(), 0
    for chunk in SAMPLED_CHUNKS:
        end = chunk * CHUNK_BYTES
        if end > len(text):
            break
        chain.update(text[done:end])
        found.append(chain.digest())
        done = end
    key = session or request.get("prompt_cache_key")
    if key and type(key) is str:
        seed = _seed(tenant, model).copy()
        seed.update(b"\xff" + key.encode("utf-8", "surrogatepass"))  # no prompt begins with this byte
        found.append(seed.digest())
    found.reverse()
    return urlsafe_b64encode(b"".join(found)).decode()


@lru_cache(1024)
def _seed(tenant: str, model: str) -> hashlib.blake2b:
    """What the digests of a tenant and a model begin with: to be copied."""
    return hashlib.blake2b(f"{len(tenant)} {tenant} {model}".encode(), digest_size=_DIGEST_BYTES)


@lru_cache(4096)
def adapter_digest(model: str) -> str:
    """What goes behind the digests of a request for a LoRA adapter, of any tenant: whoever served the adapter lately
    has it loaded."""
    return urlsafe_b64encode(hashlib.blake2b(f"adapter {model}".encode(), digest_size=_DIGEST_BYTES).digest()).decode()


def request_affinity(tenant: str, model: str, request: Mapping[str, Any], size: int, session: bytes | None) -> str:
    """:func:`prefix_digests` of a body of ``size`` bytes, at no cost for one that has none; '' without a tenant.
    ``session``: a header's value, None if it has not come."""
    if not tenant or not (size > CHUNK_BYTES or session or "prompt_cache_key" in request):
        return ""
    return prefix_digests(tenant, model, request, (session or b"").decode("latin-1"))


def split_digests(digests: str) -> list[str]:
    """The digests in what :func:`prefix_digests` gives."""
    return [digests[start : start + DIGEST_CHARS] for start in range(0, len(digests), DIGEST_CHARS)]


@record
class Match:
    """The longest prefix of a request that a cache is known to hold: ``passed`` digests of ``total`` are longer.
    ``holders`` are the caches, the latest first."""

    holders: tuple[str, ...]
    passed: int
    total: int


@dataclass(slots=True)
class WarmTable:
    """Which caches hold which prefixes: a table with a fixed number of slots, one digest in each.

    A digest replaces another one in its slot, so the table forgets at random what was not used since, and never grows
    beyond its slots.
    """

    slots: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    """Proof and holders of a digest. A holder is a cache and its number then, ``<cache>#<number>``."""

    def match(self, digests: str, limit: int = MAX_DIGESTS) -> Match | None:
        """The longest known prefix among the first ``limit`` digests."""
        every = split_digests(digests)
        for passed, digest in enumerate(every[:limit]):
            if holders := self._holders(digest):
                return Match(holders, passed, len(every))
        return None

    def remember(self, digests: str, cache: str) -> None:
        """A job with ``digests`` runs where ``cache`` is."""
        for digest in split_digests(digests):
            name = cache.partition("#")[0]
            others = [holder for holder in self._holders(digest) if holder.partition("#")[0] != name]
            self.slots[digest[:SLOT_CHARS]] = digest[SLOT_CHARS:], (cache, *others[: MAX_HOLDERS - 1])

    def _holders(self, digest: str) -> tuple[str, ...]:
        proof, holders = self.slots.get(digest[:SLOT_CHARS], ("", ()))
        return holders if proof == digest[SLOT_CHARS:] else ()


def holds(holders: Sequence[str], cache: str) -> bool:
    """Whether ``cache`` is among ``holders``, under its number now or the one before."""
    name, _, number = cache.partition("#")
    return cache in holders or f"{name}#{int(number) - 1}" in holders


def takes_warm(match: Match, free: int, slots: int, most_free: int, of_most: int) -> bool:
    """Whether a worker that holds ``match``, with ``free`` of its ``slots``, is preferred to the one with the lowest
    load, with ``most_free`` of ``of_most``.

    The bound on its load, as in consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, SODA 2018),
    here in the part of the slots that is free, rounded in the worker's favour by one slot: half as much suffices for
    the longest prefix, all but a slot must be free for a short part of it.
    """
    here, best = 2 * match.total * (free + 1) * of_most, most_free * (match.total + match.passed) * slots
    return free > 0 and here > best


def choose(table: WarmTable, waiting: Sequence[str], cache: str) -> int:
    """Which of the ``waiting`` jobs, given as their digests in fair order, a worker with ``cache`` takes: the first
    that is warm here; else the first that is warm nowhere, so that others get what they hold; else the first."""
    matches = [table.match(digests, LOOKAHEAD) for digests in waiting[:LOOKAHEAD]]
    for index, match in enumerate(matches):
        if match and holds(match.holders, cache):
            return index
    return next((index for index, match in enumerate(matches) if match is None), 0)


def patience_ms(longest_ms: int, waited_ms: int) -> int:
    """The longest wait of late, after one more job waited for ``waited_ms``; 0 stays 0, anything else is at least 1.

    A job is overtaken only until it has waited so long: overtaking does not add to the longest waits.
    """
    if not longest_ms:
        return 0
    return max(waited_ms, longest_ms - -(-(longest_ms - waited_ms) // PATIENCE_JOBS), 1)

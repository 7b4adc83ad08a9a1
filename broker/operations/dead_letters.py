"""List, read and delete dead letters: jobs whose attempts were used up, kept so that operators can find the cause."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence

from queue_schemas import BadRequest, DeadLetter, DeadLetterList, DeadRequest, InferqError, Job, Lane, ShardKeys
from queue_schemas.ids import decode_name

from ..redis.calls import Caller, pairs

_LETTER_ID = re.compile(r"([0-9]{1,4}):(([0-9]{1,20})-([0-9]{1,20}))")
_LARGEST_ID = 2**64 - 1
"""Of either part of a stream's entry ids."""
MAX_DEAD_LETTERS = 1_000
"""Dead letters in one page, or removed by one call."""


class DeadLetters:
    """The dead letters of all shards. An id is the shard and the stream entry's id: ``0:1795538964155-0``."""

    def __init__(self, caller: Caller, keys: Sequence[ShardKeys]) -> None:
        self._caller = caller
        self._keys = keys

    async def page(self, after: str, limit: int) -> DeadLetterList:
        """Up to ``limit`` dead letters after the one with the id ``after`` (empty: all), oldest first by shard."""
        first, entry = _parts(after) if after else (0, "")
        capacity = min(limit, MAX_DEAD_LETTERS)
        letters: list[DeadLetter] = []
        for keys in self._keys[first:]:
            if len(letters) < capacity:
                start, left = f"({entry}" if entry else "-", capacity - len(letters)
                found = await self._caller.command(keys.dead, "XRANGE", keys.dead, start, "+", "COUNT", left)
                letters += [_letter(keys.shard, entry_id, dict(pairs(fields))) for entry_id, fields in found]
            entry = ""
        return DeadLetterList(letters=letters, next=letters[-1].id if len(letters) >= capacity else "")

    async def request(self, letter_id: str) -> DeadRequest | None:
        """A dead letter with its request; None if there is none of that id."""
        shard, entry = _parts(letter_id)
        if shard >= len(self._keys):
            return None
        key = self._keys[shard].dead
        found = await self._caller.command(key, "XRANGE", key, entry, entry)
        if not found:
            return None
        letter = _letter(shard, found[0][0], dict(pairs(found[0][1])))
        request_key = self._keys[shard].dead_request(entry)
        try:
            job = Job.unpack(await self._caller.command(request_key, "GET", request_key) or b"")
        except InferqError as error:
            return DeadRequest(**letter.model_dump(), unreadable=error.message)
        return DeadRequest(
            **letter.model_dump(),
            path=job.path,
            content_type=job.content_type,
            request_id=job.request_id,
            body_base64=base64.b64encode(job.body).decode(),
        )

    async def forget(self, letter_ids: Iterable[str]) -> int:
        """Delete dead letters. Returns how many there were."""
        by_shard: dict[int, list[str]] = {}
        for letter_id in letter_ids:
            shard, entry = _parts(letter_id)
            by_shard.setdefault(shard, []).append(entry)
        removed = 0
        for shard, entries in by_shard.items():
            if shard < len(self._keys):
                keys = self._keys[shard]
                removed += int(await self._caller.script("delete_dead_letters", keys.budget, keys.prefix, *entries))
        return removed


def _parts(letter_id: str) -> tuple[int, str]:
    match = _LETTER_ID.fullmatch(letter_id)
    if match is None or max(int(match[3]), int(match[4])) > _LARGEST_ID:
        raise BadRequest(f"{letter_id[:60]!r} is not the id of a dead letter; `inferq dead list` shows them")
    return int(match[1]), match[2]


def _letter(shard: int, entry_id: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    entry = entry_id.decode()
    return DeadLetter(
        id=f"{shard}:{entry}",
        job_id=fields[b"id"].decode(),
        at_ms=int(entry.partition("-")[0]),
        model=decode_name(fields[b"pool"].decode()),
        tenant=decode_name(fields[b"tenant"].decode()),
        lane=Lane(fields[b"lane"].decode()),
        cause=fields[b"cause"].decode("utf-8", "replace"),
        worker=fields[b"worker"].decode(),
        attempts=int(fields[b"attempts"]),
        size_bytes=int(fields[b"size"]),
    )

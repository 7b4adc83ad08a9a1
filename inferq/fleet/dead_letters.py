"""``inferq dead``: list, show, replay and purge dead letters."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Sequence
from math import inf

from inferq.client import RequestFailed
from inferq.console import err, out, print_json, visible
from inferq.tables import Column, Row, print_table
from queue_schemas import DeadLetter, DeadRequest

from .client import FleetClient

PAGE = 500
_CAUSE_CHARS = 80
_BROKEN = b'data: {"error"'


async def list_letters(client: FleetClient, *, limit: int, as_json: bool) -> None:
    """Print the oldest ``limit`` letters."""
    async with client:
        letters = await _all(client, limit)
    if as_json:
        print_json([letter.model_dump(mode="json") for letter in letters])
    elif letters:
        print_table(_COLUMNS, [_row(letter) for letter in letters])
    else:
        out.print("No dead letters: every request was answered, or ended by its client or its deadline.")


async def show_letter(client: FleetClient, letter_id: str, *, as_json: bool) -> None:
    """Print one letter with its request."""
    async with client:
        letter = await client.dead_request(letter_id)
    if as_json:
        print_json(letter.model_dump(mode="json"))
        return
    for name, value in letter.model_dump(exclude={"body_base64"}).items():
        if value != "":
            out.print(visible(f"{name}: {value}"), markup=False, emoji=False)
    if letter.body_base64:
        body = base64.b64decode(letter.body_base64).decode("utf-8", "replace")
        out.print(visible(body), markup=False, emoji=False)


async def replay_letters(client: FleetClient, letter_ids: Sequence[str]) -> None:
    """Send each request again, with the API key that is given; print its answer, then remove the letter.

    A request that fails again, or cannot be sent, keeps its letter and makes the command fail. The others are sent all
    the same.
    """
    failed = 0
    async with client:
        for letter_id in letter_ids:
            try:
                letter = await client.dead_request(letter_id)
                body = base64.b64decode(letter.body_base64)
                answer = _unbroken(await client.replay(_path(letter), body, letter.content_type))
            except RequestFailed as refused:
                failed += 1
                failure = visible(f"{letter_id} failed again: {refused.message}")
                err.print(failure, style="red", markup=False, emoji=False)
                continue
            sys.stdout.write(answer.decode("utf-8", "replace").rstrip("\n") + "\n")
            sys.stdout.flush()
            await client.purge_dead([letter_id])
    if failed:
        raise RequestFailed(f"{failed} of {len(letter_ids)} requests failed again; their letters are kept")


async def purge_letters(client: FleetClient, letter_ids: Sequence[str], *, older_than_s: float | None) -> None:
    """Remove the letters named, or all that are older than ``older_than_s`` (None: all)."""
    async with client:
        if not letter_ids:
            # All of them whatever this machine's clock says: their times are the queue's.
            before_ms = inf if older_than_s is None else (time.time() - older_than_s) * 1000
            letter_ids = [letter.id for letter in await _all(client, None) if letter.at_ms <= before_ms]
        removed = 0
        for start in range(0, len(letter_ids), PAGE):
            removed += await client.purge_dead(letter_ids[start : start + PAGE])
    out.print(f"{removed} removed")


async def _all(client: FleetClient, limit: int | None) -> list[DeadLetter]:
    letters: list[DeadLetter] = []
    after = ""
    while limit is None or len(letters) < limit:
        page = await client.dead_letters(after, PAGE if limit is None else min(PAGE, limit - len(letters)))
        letters += page.letters
        after = page.next
        if not after:
            break
    return letters


def _path(letter: DeadRequest) -> str:
    if not letter.path:
        raise RequestFailed(f"{letter.id} cannot be sent again: {letter.unreadable}")
    return letter.path


def _unbroken(answer: bytes) -> bytes:
    if _BROKEN in answer:
        raise RequestFailed("its stream ended with an error")
    return answer


_COLUMNS = (
    Column("ID"),
    Column("AT", 4),
    Column("MODEL", 1, shrinks=True),
    Column("TENANT", 5, shrinks=True),
    Column("ATTEMPTS", 6, right=True),
    Column("BYTES", 7, right=True),
    Column("WORKER", 3),
    Column("CAUSE", 2, shrinks=True),
)


def _row(letter: DeadLetter) -> Row:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.at_ms / 1000))
    figures = (str(letter.attempts), str(letter.size_bytes))
    cause = letter.cause[:_CAUSE_CHARS]
    return Row((letter.id, at, letter.model, letter.tenant, *figures, letter.worker, cause))

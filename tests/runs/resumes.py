"""Streams are read in pieces from any Router while workers are killed: together the pieces are the stored answer.

``python -m tests.runs.resumes --resumes 1000``. The engine never says the same twice, so that a second run of a stream
would show.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from queue_schemas import ShardKeys
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server, server_binary
from tests.support.sse import read_events
from tests.support.waiting import eventually

PATH = "/v1/chat/completions"
BACKGROUND = {"x-inferq-background": "true"}
RESUMABLE = {"x-inferq-resumable": "true"}
ENGINE = {"sim_mode": "text", "sim_nondeterministic": True, "sim_tokens_per_s": 60, "slots": 16}
ROUNDS = 8
_ID = re.compile(rb"\nid: ([^\n]+)\n")


def asked(number: int, tokens: int) -> dict[str, Any]:
    """One stream, of an engine's making."""
    messages = [{"role": "user", "content": f"tell {number}"}]
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": "sim", "messages": messages, "max_tokens": tokens} | usage


@dataclass
class Stream:
    """What one client has of one stream: whole events without their ids, and the id of each."""

    job_id: str = ""
    events: list[bytes] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    over: bool = False

    @property
    def text(self) -> bytes:
        return b"".join(self.events)

    def take(self, event: bytes) -> None:
        """A whole event came."""
        match = _ID.search(event)
        assert match is not None, f"an event without an id: {event!r}"
        self.events.append(event.replace(match[0], b"\n"))
        self.ids.append(match[1].decode())
        named, _, number = self.ids[-1].rpartition(":")
        assert int(number.partition("-")[0]) == len(self.ids), f"{self.ids[-1]} is event {len(self.ids)}"
        self.job_id = self.job_id or named
        self.over = event.startswith(b"data: [DONE]")


class Reading:
    """Reads streams in pieces, through any of ``routers``."""

    def __init__(self, fleet: Fleet, routers: Sequence[Role], rng: random.Random) -> None:
        self._session = fleet.session
        self._routers = routers
        self._rng = rng
        self.pieces = 0
        self.ways: Counter[str] = Counter()

    async def submit(self, fields: dict[str, Any]) -> Stream:
        """A stream of the background."""
        url = self._rng.choice(self._routers).url + PATH
        async with self._session.post(url, json=fields, headers=BACKGROUND) as answer:
            job = await answer.json()
            assert answer.status == 202, job
            return Stream(job["id"])

    async def whole(self, stream: Stream, fields: dict[str, Any] | None = None, most: int = 12) -> None:
        """Read to the end, up to ``most`` events at a time; ``fields``: a stream that is asked for by POST."""
        while not stream.over:
            count = self._rng.randint(1, most)
            async with self._open(stream, fields) as answer:
                assert answer.status == 200, (answer.status, await answer.text())
                await self._read(stream, answer, count)
            self.pieces += 1

    async def rest(self, stream: Stream) -> bytes:
        """What follows behind any event of a stream that was read whole, with the beginning."""
        at = self._rng.randrange(len(stream.ids))
        again = Stream(stream.job_id, stream.events[:at], stream.ids[:at])
        async with self._open(again, None) as answer:
            assert answer.status == 200, (answer.status, await answer.text())
            await self._read(again, answer, 1_000_000)
        self.pieces += 1
        assert again.over
        return again.text

    async def stored(self, job_id: str) -> bytes:
        """The answer as it is kept."""
        url = f"{self._rng.choice(self._routers).url}/v1/jobs/{job_id}/output"
        async with self._session.get(url) as answer:
            assert answer.status == 200
            return await answer.read()

    def _open(self, stream: Stream, fields: dict[str, Any] | None) -> Any:
        base = self._rng.choice(self._routers).url
        last = {"last-event-id": stream.ids[-1]} if stream.ids else {}
        if fields is not None and (not stream.ids or self._rng.random() < 0.5):
            self.ways["POST, last-event-id"] += bool(last)
            return self._session.post(base + PATH, json=fields, headers=RESUMABLE | last)
        url = f"{base}/v1/jobs/{stream.job_id}/events"
        if fields is None and stream.ids and self._rng.random() < 0.5:
            self.ways["GET, starting_after"] += 1
            return self._session.get(f"{url}?starting_after={len(stream.ids)}")
        self.ways["GET, last-event-id"] += bool(last)
        return self._session.get(url, headers=last)

    async def _read(self, stream: Stream, answer: aiohttp.ClientResponse, count: int) -> None:
        """Up to ``count`` events; then the connection is dropped, wherever it is."""
        events = await read_events(answer, count)
        answer.close()
        for event in events:
            stream.take(event)
        assert stream.over or len(events) == count, f"the stream ended behind {stream.ids[-1:]}"


@dataclass(frozen=True, slots=True)
class Result:
    """What a run saw. ``interrupted``: attempts beyond the first of each job."""

    resumes: int
    streams: int
    kills: int
    interrupted: int
    ways: Counter[str]
    seconds: float


async def resume_all(
    fleet: Fleet, routers: Sequence[Role], rng: random.Random, *, resumes: int, streams: int, tokens: int, kills: int
) -> Result:
    """Read ``streams`` streams in pieces, half of the background and half their clients' own, until there were so many
    resumes; workers are killed, and started again, meanwhile. Each is what is stored of it, and then forgotten."""
    begun = time.monotonic()
    reading = Reading(fleet, routers, rng)
    questions = [asked(number, tokens) for number in range(streams)]
    background = [await reading.submit(question) for question in questions[::2]]
    own = [(Stream(), question) for question in questions[1::2]]
    over = asyncio.Event()
    killing = asyncio.create_task(kill_busy(fleet, rng, kills, over))
    async with asyncio.TaskGroup() as tasks:
        for stream in background:
            tasks.create_task(reading.whole(stream))
        for stream, question in own:
            tasks.create_task(reading.whole(stream, question))
    over.set()
    killed = await killing
    everything = background + [stream for stream, _ in own]
    attempts = 0
    for stream in everything:
        assert stream.text == await reading.stored(stream.job_id), stream.job_id
        told = await rng.choice(routers).page(f"/v1/jobs/{stream.job_id}")
        assert told["status"] == "completed"
        assert told["response"]["body"].encode() == stream.text
        attempts += told["attempts"]
        assert _answer_of(stream.text), "it has a text"
    while (left := resumes - reading.ways.total()) > 0:
        chosen = rng.choices(everything, k=min(left, 64))
        for stream, text in zip(chosen, await asyncio.gather(*map(reading.rest, chosen)), strict=True):
            assert text == stream.text, stream.job_id
    for stream in everything:
        async with fleet.session.delete(f"{rng.choice(routers).url}/v1/jobs/{stream.job_id}") as answer:
            assert answer.status == 200
    await eventually(lambda: not persisted_keys(fleet.server), "nothing is kept any more")
    return Result(reading.ways.total(), streams, killed, attempts - streams, reading.ways, time.monotonic() - begun)


def persisted_keys(server: Server) -> dict[bytes, Any]:
    """What Redis holds of persisted jobs: budgets, outputs, lists, times."""
    keys = ShardKeys(0)
    budget = {name: value for name, value in server.ask("HGETALL", keys.budget).items() if b":persisted" in name}
    for pattern in ("out:*", "listed:*", "listeners:*", "persisted"):
        for key in server.ask("KEYS", keys.prefix.replace("{", "[{]") + pattern):
            budget[key] = b"1"
    return budget


def _answer_of(text: bytes) -> str:
    """The text of a stream, whose end says how many tokens it had."""
    chunks = [json.loads(event[6:]) for event in text.split(b"\n\n") if event.startswith(b"data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    (usage,) = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len([choice for choice in choices if choice["finish_reason"]]) == 1
    answer = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert len(answer) == usage["completion_tokens"] * 4
    return answer


async def kill_busy(fleet: Fleet, rng: random.Random, kills: int, over: asyncio.Event) -> int:
    """SIGKILL a busy worker, and start it again unless it is the last time, so many times unless it is ``over`` before;
    how many times."""
    for done in range(kills):

        async def busy() -> list[Role] | bool:
            pages = [(worker, await worker.page("/status")) for worker in fleet.workers if worker.process.running]
            return [worker for worker, page in pages if page["running"]] or over.is_set()

        victims = await eventually(busy, "a worker is busy")
        if not isinstance(victims, list):
            return done
        await asyncio.sleep(rng.uniform(0.05, 0.2))
        victim = rng.choice(victims)
        victim.process.kill()
        if done < kills - 1:
            await victim.start()
    return kills


@asynccontextmanager
async def fleet_with_three_routers(**flags: object) -> AsyncIterator[tuple[Fleet, list[Role]]]:
    """Three workers with these flags behind three Routers, on a Valkey of their own."""
    with (
        tempfile.TemporaryDirectory(prefix="inferq-run-") as name,
        Server(server_binary(), Path(name) / "valkey") as server,
    ):
        async with Fleet(Path(name), server) as fleet:
            routers = [fleet.router, *(fleet.another_router(name) for name in ("second", "third"))]
            await fleet.up(workers=3, **(ENGINE | flags))
            await asyncio.gather(*(router.start() for router in routers[1:]))
            yield fleet, routers


async def start_killed_workers(fleet: Fleet) -> None:
    """Start every worker that does not run."""
    await asyncio.gather(*(worker.start() for worker in fleet.workers if not worker.process.running))


async def main(resumes: int, seed: int) -> None:
    """The run at full length, in rounds, and what it saw."""
    rng, results = random.Random(seed), []
    share = -(-resumes // ROUNDS)
    async with fleet_with_three_routers(sim_answer_tokens=200, sim_tokens_per_s=40) as (fleet, routers):
        for _ in range(ROUNDS):
            await start_killed_workers(fleet)
            results.append(await resume_all(fleet, routers, rng, resumes=share, streams=12, tokens=250, kills=2))
            print(
                f"{results[-1].resumes} resumes, {results[-1].interrupted} attempts lost, "
                f"{results[-1].seconds:.0f} s; then {fleet.server.ask('DBSIZE')} keys, "
                f"{fleet.server.ask('INFO', 'memory')['used_memory'] >> 10} KiB in Redis"
            )
    ways = sum((result.ways for result in results), Counter[str]())
    print(
        f"{ways.total()} resumes of {sum(result.streams for result in results)} streams over {len(routers)} Routers, "
        f"{sum(result.kills for result in results)} workers killed, {sum(result.interrupted for result in results)} "
        f"attempts lost, seed {seed}: each time the stored answer"
    )
    print(", ".join(f"{way}: {count}" for way, count in sorted(ways.items())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resumes", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = parser.parse_args()
    asyncio.run(main(given.resumes, given.seed))

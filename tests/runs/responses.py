"""Background responses are read in pieces from any Router while workers are killed: together the pieces are the stored
response.

``python -m tests.runs.responses --resumes 1000``. The engine never says the same twice, so that a second run of a chat
would show.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from tests.support.fleet import MODEL, Fleet, Role
from tests.support.responses import check_stream
from tests.support.sse import read_events
from tests.support.waiting import eventually

from .resumes import fleet_with_three_routers, kill_busy, persisted_keys, start_killed_workers

PATH = "/v1/responses"
ROUNDS = 8


@dataclass
class Reader:
    """What one client has of the events of one response."""

    name: str
    events: list[dict[str, Any]] = field(default_factory=list)
    resumes: int = 0

    @property
    def over(self) -> bool:
        return bool(self.events) and self.events[-1].get("response", {}).get("status") == "completed"

    async def read(self, fleet: Fleet, router: Role, count: int) -> None:
        """Up to ``count`` events behind the last one; then the connection is dropped, wherever it is."""
        after = {"starting_after": self.events[-1]["sequence_number"]} if self.events else {}
        self.resumes += bool(after)
        url = f"{router.url}{PATH}/{self.name}"
        async with fleet.session.get(url, params={"stream": "true"} | after) as answer:
            assert answer.status == 200, (answer.status, await answer.text())
            events = await read_events(answer, count)
            answer.close()
        self.events += [orjson.loads(event.partition(b"\ndata: ")[2]) for event in events]
        assert self.over or len(events) == count, f"the stream ended behind {self.events[-1:]}"


async def resume_responses(
    fleet: Fleet, routers: Sequence[Role], rng: random.Random, *, resumes: int, responses: int, tokens: int, kills: int
) -> tuple[int, int]:
    """Read ``responses`` responses in pieces, then each from anywhere, until there were so many resumes; workers are
    killed meanwhile, and started again. How many resumes there were, and attempts beyond the first of each job."""
    before = persisted_keys(fleet.server)
    names = [await _create(fleet, rng.choice(routers), f"tell {number}", tokens) for number in range(responses)]
    readers = [Reader(name) for name in names]
    over = asyncio.Event()

    async def whole(reader: Reader) -> None:
        while not reader.over:
            await reader.read(fleet, rng.choice(routers), rng.randint(1, 20))

    killing = asyncio.create_task(kill_busy(fleet, rng, kills, over))
    async with asyncio.TaskGroup() as tasks:
        for reader in readers:
            tasks.create_task(whole(reader))
    over.set()
    await killing
    attempts = 0
    for reader in readers:
        response = check_stream(reader.events)
        assert await rng.choice(routers).page(f"{PATH}/{reader.name}") == reader.events[-1]["response"]
        assert response.usage is not None
        assert len(response.output_text) == response.usage.output_tokens * 4
        attempts += (await rng.choice(routers).page(f"/v1/jobs/{reader.name.removeprefix('resp_')}"))["attempts"]
    while (done := sum(reader.resumes for reader in readers)) < resumes:
        chosen = rng.choices(readers, k=min(resumes - done, 64))
        await asyncio.gather(*(_from_anywhere(fleet, routers, rng, reader) for reader in chosen))
    for name in names:
        async with fleet.session.delete(f"{rng.choice(routers).url}{PATH}/{name}") as answer:
            assert answer.status == 200
    await eventually(lambda: persisted_keys(fleet.server) == before, "nothing is kept of them any more")
    return done, attempts - responses


async def _from_anywhere(fleet: Fleet, routers: Sequence[Role], rng: random.Random, reader: Reader) -> None:
    at = rng.randrange(1, len(reader.events))
    again = Reader(reader.name, reader.events[:at])
    await again.read(fleet, rng.choice(routers), 1_000_000)
    reader.resumes += 1
    assert again.events == reader.events, reader.name


async def _create(fleet: Fleet, router: Role, text: str, tokens: int) -> str:
    fields = {"model": MODEL, "input": text, "background": True, "max_output_tokens": tokens, "temperature": 0.8}
    async with fleet.session.post(router.url + PATH, json=fields) as answer:
        response: dict[str, Any] = await answer.json()
        assert answer.status == 200, response
        return str(response["id"])


async def main(resumes: int, seed: int) -> None:
    """The run at full length, in rounds, and what it saw."""
    rng, begun, resumed, lost = random.Random(seed), time.monotonic(), 0, 0
    share = -(-resumes // ROUNDS)
    async with fleet_with_three_routers(sim_answer_tokens=120) as (fleet, routers):
        for _ in range(ROUNDS):
            await start_killed_workers(fleet)
            more = await resume_responses(fleet, routers, rng, resumes=share, responses=8, tokens=300, kills=2)
            resumed, lost = resumed + more[0], lost + more[1]
            print(f"{resumed} resumes, {lost} attempts lost, {time.monotonic() - begun:.0f} s")
    print(f"{resumed} resumes over {len(routers)} Routers, seed {seed}: each time the stored response")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resumes", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = parser.parse_args()
    asyncio.run(main(given.resumes, given.seed))

"""Measure how well waits are predicted, and whether the requests that are refused would have missed their deadlines.

``python -m bench.admission`` sends the same requests at the same random times to a fleet that refuses (``admission =
on``) and then, replayed, to one that does not. The load swings around what the fleet can serve, so that waits grow and
shrink; some requests have short deadlines of any length, the others wait for as long as it takes. It prints how many
were refused, and what share of these did miss their deadline in the replay; and the error of predicted waits, from the
worker's metric.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console

from .tenants import Fleet, ask, at_random_times, chat, fleet

_TENANTS = {"first": 1.0, "second": 1.0}
_BUCKET = re.compile(r'^inferq_predicted_wait_error_ratio_bucket\{.*le="([^"]+)".*\} (\S+)$', re.MULTILINE)
_WORDS, _TOKENS = (5, 400), (5, 35)
REFUSED, SERVED, MISSED = "refused", "served", "missed"


async def replay(one: Fleet, options: argparse.Namespace, rates: Sequence[float]) -> dict[int, str]:
    """Send the requests, and say of each what became of it. ``rates``: requests a second in each second."""
    outcomes: dict[int, str] = {}
    rng = random.Random(7)

    async def send(number: int) -> None:
        own = random.Random(number)
        tenant = own.choice(list(_TENANTS))
        body = chat(own, _WORDS, _TOKENS)
        is_short = own.random() < options.short_share
        deadline_ms = own.randint(options.deadline_ms // 10, options.deadline_ms) if is_short else 120_000
        status, answer = await ask(one.routers[0], tenant, body, x_inferq_deadline_ms=str(deadline_ms))
        if status == 429 and answer["error"]["code"] != "wait_too_long":
            raise ValueError(answer)
        outcomes[number] = {200: SERVED, 429: REFUSED, 504: MISSED}[status]

    async with asyncio.TaskGroup() as group:
        first = 0
        for rate in rates:
            async for number in at_random_times(rng, rate, 1.0):
                group.create_task(send(first + number))
            first += 1_000_000
    return outcomes


async def errors(one: Fleet) -> dict[float, float]:
    """How many predictions were off by at most so much, by the worker's histogram."""
    async with aiohttp.ClientSession() as session, session.get(f"{one.worker_url}/metrics") as answer:
        found = _BUCKET.findall(await answer.text())
    return {float("inf") if bound == "+Inf" else float(bound): float(number) for bound, number in found}


def median(buckets: dict[float, float]) -> float:
    """The median of a histogram, between the bounds of its bucket by proportion."""
    half, below, lower = buckets[math.inf] / 2, 0.0, 0.0
    for bound, number in sorted(buckets.items()):
        if number >= half:
            return lower + (bound - lower) * (half - below) / (number - below)
        below, lower = number, bound
    raise ValueError("nothing was predicted")


async def _run(
    options: argparse.Namespace, folder: Path, rates: Sequence[float], *, admission: str
) -> tuple[dict[int, str], dict[float, float]]:
    settings = ("--admission", admission, "--admission-margin", str(options.margin))
    async with fleet(folder, _TENANTS, slots=options.slots, router_options=settings) as one:
        # What a fleet has just begun to serve says nothing of how fast it is.
        warm_up = options.capacity * 0.7
        await replay(one, options, [warm_up] * 5)
        outcomes = await replay(one, options, rates)
        return outcomes, await errors(one)


async def _all(options: argparse.Namespace, console: Console) -> None:
    swings = [options.capacity * (2.0 if second % 14 < 8 else 0.2) for second in range(options.seconds)]
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        folder = Path(name)
        with_it, error = await _run(options, folder / "on", swings, admission="on")
        without, open_error = await _run(options, folder / "off", swings, admission="off")
    refused = [number for number, outcome in with_it.items() if outcome == REFUSED]
    right = sum(without[number] == MISSED for number in refused)
    for title, outcomes in (("with admission", with_it), ("without", without)):
        counts = {kind: list(outcomes.values()).count(kind) for kind in (SERVED, MISSED, REFUSED)}
        console.print(f"{title}: {counts}")
    console.print(f"refused: {len(refused)}; of these missed in the replay: {right / max(len(refused), 1):.1%}")
    for title, buckets in (("with admission", error), ("without", open_error)):
        console.print(f"error of predicted waits, {title}: median {median(buckets):.1%} of {buckets[math.inf]:.0f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.admission", description=__doc__)
    parser.add_argument("--seconds", type=int, default=98)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--capacity", type=float, default=34.0, help="requests a second that the fleet can serve")
    parser.add_argument("--short-share", type=float, default=0.6, help="of requests with a short deadline")
    parser.add_argument("--deadline-ms", type=int, default=6_000, help="the longest of the short ones")
    parser.add_argument("--margin", type=float, default=0.25, help="admission_margin of the Router")
    uvloop.run(_all(parser.parse_args(argv), Console(width=120)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

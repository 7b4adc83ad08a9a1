"""Measure how two tenants share a model's tokens.

``python -m bench.fairness`` starts a fleet for each case: ten times the load at equal weights, and equal load with
weights 4:1, through one, two and four Routers, all traffic of the first tenant through one of them. Each tenant's
clients send one request after another, so both always have requests that wait. It prints the share of tokens that each
was served (prompt 1, output 2), beside its weight, and by how much it is off. Their requests differ in size: equal
shares of requests would be far off.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table

from scheduling.cost import Usage, cost_of

from .tenants import Fleet, ask, chat, fleet

_WARM_UP_S = 4.0
_SIZES = {"first": ((20, 200), (5, 20)), "second": ((200, 800), (10, 40))}
"""Words of a prompt and tokens of an answer, at least and at most."""


@dataclass(frozen=True, slots=True)
class Case:
    """Clients of each tenant, and their weights."""

    name: str
    clients: tuple[int, int]
    weights: tuple[float, float]

    @property
    def share(self) -> float:
        """What the first tenant should be served."""
        return self.weights[0] / sum(self.weights)


CASES = (
    Case("10:1 load, equal weights", (160, 16), (1, 1)),
    Case("1:1 load, weights 4:1", (64, 64), (4, 1)),
)


async def _client(session: aiohttp.ClientSession, tenant: str, seed: int, served: dict[str, int]) -> None:
    rng = random.Random(seed)
    while True:
        status, answer = await ask(session, tenant, chat(rng, *_SIZES[tenant]))
        if status != 200:
            raise ValueError(f"{tenant} was answered {status}: {answer}")
        usage = answer["usage"]
        served[tenant] += cost_of(Usage(usage["prompt_tokens"], usage["completion_tokens"]))


async def _serve(one: Fleet, case: Case, seconds: float) -> dict[str, int]:
    served = {"first": 0, "second": 0}
    others = one.routers[1:] or one.routers
    seeds = count(1)
    async with asyncio.TaskGroup() as group:
        clients = [
            group.create_task(_client(router, tenant, next(seeds), served))
            for tenant, number, routers in zip(served, case.clients, (one.routers[:1], others), strict=True)
            for index in range(number)
            for router in [routers[index % len(routers)]]
        ]
        await asyncio.sleep(_WARM_UP_S)
        before = dict(served)
        await asyncio.sleep(seconds)
        after = dict(served)
        for client in clients:
            client.cancel()
    return {tenant: after[tenant] - before[tenant] for tenant in served}


async def _all(options: argparse.Namespace, console: Console) -> None:
    table = Table(title=f"{options.slots} slots, {options.seconds:g} s each")
    for column in ("", "Routers", "cost/s", "share of the first", "its weight's", "off by"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        for case in CASES:
            for routers in options.routers:
                weights = dict(zip(("first", "second"), case.weights, strict=True))
                folder = Path(name) / f"{case.clients[0]}-{routers}"
                async with fleet(folder, weights, routers=routers, slots=options.slots) as one:
                    served = await _serve(one, case, options.seconds)
                total = sum(served.values())
                share = served["first"] / total
                off = max(abs(share / case.share - 1), abs((1 - share) / (1 - case.share) - 1))
                row = (case.name, str(routers), f"{total / options.seconds:,.0f}")
                table.add_row(*row, f"{share:.3f}", f"{case.share:.3f}", f"{off:.1%}")
                console.print(f"{case.name}, {routers} Routers: {served}, off by {off:.1%}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.fairness", description=__doc__)
    parser.add_argument("--routers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each case, after a warm-up")
    parser.add_argument("--slots", type=int, default=8)
    uvloop.run(_all(parser.parse_args(argv), Console(width=120)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

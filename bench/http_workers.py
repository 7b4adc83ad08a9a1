"""A worker that has the queue over HTTP, beside one at Redis. ``python -m bench.http_workers``.

Two whole fabrics in front of one engine, measured in turns; CPU is that of all processes of each.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop
from rich.console import Console

from .processes import new_folder
from .ratios import LOADS, ratio_table, windows_in_turns
from .systems import System, fake_engine, whole_inferq
from .windows import SCENARIOS

TRANSPORTS = ("redis", "http")


async def run(rounds: int, console: Console) -> None:
    """Measure and print."""
    loads = (*LOADS, *(one for one in SCENARIOS if one.name == "256 streams"))
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        async with AsyncExitStack() as exits:
            folder = Path(name)
            engine_port, _ = await exits.enter_async_context(fake_engine(folder))
            systems = []
            for transport in TRANSPORTS:
                fabric, _ = await exits.enter_async_context(
                    whole_inferq(new_folder(folder / transport), f"http://127.0.0.1:{engine_port}", transport=transport)
                )
                systems.append(System(transport, fabric.port, fabric.pids))
            found = await windows_in_turns(systems, loads, rounds, console)
    console.print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; medians of {rounds} "
        "rounds, in brackets the median ratio to redis"
    )
    console.print(ratio_table(found, loads, TRANSPORTS))
    for transport in TRANSPORTS:
        last = [one for one in found if one.system == transport and one.scenario == "32 streams"][-1]
        console.print(transport, {process: round(us, 1) for process, us in last.cpu_us_of.items()})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    uvloop.run(run(parser.parse_args(argv).rounds, Console(width=140)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

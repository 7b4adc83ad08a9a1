"""``inferq queues`` and ``inferq workers``: what waits and runs, and who does the work."""

from __future__ import annotations

import asyncio

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from inferq.client import FabricClient, FabricRefused
from inferq.console import out, print_json
from queue_schemas import PoolDepth, WorkerInfo


async def show_queues(client: FabricClient, *, watch: bool, interval_s: float, as_json: bool) -> None:
    """Print the pools once, or again and again with ``watch`` (as JSON: one line for each look)."""
    async with client:
        if not watch:
            pools = await client.pools()
            if as_json:
                print_json([pool.model_dump(mode="json") for pool in pools])
            else:
                out.print(pools_table(pools))
            return
        if as_json:
            while True:
                print_json([pool.model_dump(mode="json") for pool in await client.pools()], line=True)
                await asyncio.sleep(interval_s)
        with Live(console=out, auto_refresh=False, transient=True) as live:
            while True:
                live.update(await _look(client), refresh=True)
                await asyncio.sleep(interval_s)


async def show_workers(client: FabricClient, *, as_json: bool) -> None:
    """Print the fleet."""
    async with client:
        fleet = await client.workers()
        if as_json:
            print_json(fleet.model_dump(mode="json"))
        else:
            out.print(workers_table(fleet.workers))


def pools_table(pools: list[PoolDepth]) -> RenderableType:
    """One row per lane in use of each model."""
    if not pools:
        return Text("No model is known yet: nothing was asked for, and no worker has joined.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("MODEL")
    table.add_column("LANE")
    for name in ("WAITING", "RUNNING", "OLDEST", "WORKERS", "SLOTS"):
        table.add_column(name, justify="right")
    for pool in pools:
        style = "yellow" if pool.waiting and not pool.workers else ""
        lanes = [(lane, depth) for lane, depth in pool.lanes.items() if depth.waiting or depth.leased]
        first, fleet = pool.model, (str(pool.workers), str(pool.slots))
        for lane, depth in lanes:
            figures = (str(depth.waiting), str(depth.leased), _age(depth.oldest_age_ms) if depth.waiting else "-")
            table.add_row(first, str(lane), *figures, *fleet, style=style)
            first, fleet = "", ("", "")
        if not lanes:
            table.add_row(first, "-", "0", "0", "-", *fleet)
    return table


def workers_table(workers: list[WorkerInfo]) -> RenderableType:
    """One row per worker."""
    if not workers:
        return Text("No worker has joined: start one with `inferq worker`.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("WORKER", "STATE", "ENGINE", "RUNNING", "HEARTBEAT", "URL", "MODELS"):
        table.add_column(name, justify="right" if name in {"RUNNING", "HEARTBEAT"} else "left")
    for worker in workers:
        engine = f"{worker.engine} ({worker.engine_detail})" if worker.engine_detail else str(worker.engine)
        table.add_row(
            worker.worker_id,
            str(worker.state),
            engine,
            f"{worker.running}/{worker.slots}",
            f"{_age(worker.heartbeat_age_ms)} ago",
            worker.url or "-",
            ", ".join(worker.models) or "-",
            style="" if worker.takes_work else "yellow",
        )
    return table


async def _look(client: FabricClient) -> RenderableType:
    """The current table; a Router that is away for a moment does not end the watch."""
    try:
        return pools_table(await client.pools())
    except FabricRefused as refused:
        return Group(Text(refused.message, style="red"))


def _age(milliseconds: int) -> str:
    seconds = milliseconds / 1000
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

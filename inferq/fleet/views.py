"""``inferq queues`` and ``inferq workers``: print queue depths and the fleet."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from inferq.client import RequestFailed
from inferq.console import err, out, print_json
from inferq.invocation import pause
from inferq.tables import UNLIMITED, Column, Row, fitted_table, output_width, print_whole
from queue_schemas import PoolDepth, WorkerInfo

from .client import FleetClient


async def show_queues(client: FleetClient, *, watch: bool, interval_s: float, as_json: bool) -> None:
    """Print the pools once, or with ``watch`` every ``interval_s``: in place on a terminal, else as one table each
    time, or as one line of JSON."""
    async with client:
        if not watch:
            pools = await client.pools()
            if as_json:
                print_json([pool.model_dump(mode="json") for pool in pools])
            else:
                _print(pools_table(pools, output_width()))
            return
        if as_json:
            while True:
                print_json([pool.model_dump(mode="json") for pool in await client.pools()], line=True)
                await pause(interval_s)
        if not out.is_terminal:
            while True:
                await _print_once(client)
                await pause(interval_s)
        with Live(console=out, auto_refresh=False, transient=True) as live:
            while True:
                live.update(await _current(client), refresh=True)
                await pause(interval_s)


async def show_workers(client: FleetClient, *, as_json: bool) -> None:
    """Print the fleet."""
    async with client:
        fleet = await client.workers()
        if as_json:
            print_json(fleet.model_dump(mode="json"))
        else:
            _print(workers_table(fleet.workers, output_width()))


_POOL_COLUMNS = (
    Column("MODEL"),
    Column("LANE", 2),
    Column("WAITING", 1, right=True),
    Column("RUNNING", 3, right=True),
    Column("OLDEST", 4, right=True),
    Column("WORKERS", 5, right=True),
    Column("SLOTS", 6, right=True),
)
_WORKER_COLUMNS = (
    Column("WORKER"),
    Column("STATE", 1),
    Column("ENGINE", 2, shrinks=True),
    Column("RUNNING", 3, right=True),
    Column("HEARTBEAT", 5, right=True),
    Column("URL", 6),
    Column("MODELS", 4, shrinks=True),
)


def pools_table(pools: list[PoolDepth], width: int = UNLIMITED) -> RenderableType:
    """One row per lane in use of each model."""
    if not pools:
        return Text("No model is known yet: there was no request, and no worker has joined.")
    rows = []
    for pool in pools:
        style = "yellow" if pool.waiting and not pool.workers else ""
        lanes = [(lane, depth) for lane, depth in pool.lanes.items() if depth.waiting or depth.leased]
        first, fleet = pool.model, (str(pool.workers), str(pool.slots))
        for lane, depth in lanes:
            figures = (str(depth.waiting), str(depth.leased), _age(depth.oldest_age_ms) if depth.waiting else "-")
            rows.append(Row((first, str(lane), *figures, *fleet), style))
            first, fleet = "", ("", "")
        if not lanes:
            rows.append(Row((first, "-", "0", "0", "-", *fleet)))
    return fitted_table(_POOL_COLUMNS, rows, width)


def workers_table(workers: list[WorkerInfo], width: int = UNLIMITED) -> RenderableType:
    """One row per worker."""
    if not workers:
        return Text("No worker has joined: start one with `inferq worker`.")
    rows = []
    for worker in workers:
        engine = f"{worker.engine} ({worker.engine_detail})" if worker.engine_detail else str(worker.engine)
        cells = (
            worker.worker_id,
            str(worker.state),
            engine,
            f"{worker.running}/{worker.slots}",
            f"{_age(worker.heartbeat_age_ms)} ago",
            worker.url or "-",
            ", ".join(worker.models) or "-",
        )
        rows.append(Row(cells, "" if worker.takes_work else "yellow"))
    return fitted_table(_WORKER_COLUMNS, rows, width)


def _print(shown: RenderableType) -> None:
    if isinstance(shown, Table):
        print_whole(shown)
    else:
        out.print(shown)


async def _print_once(client: FleetClient) -> None:
    """Print a table and an empty line, or an error to standard error."""
    try:
        _print(pools_table(await client.pools(), output_width()))
        out.print()
    except RequestFailed as refused:
        err.print(refused.message, style="red", markup=False)


async def _current(client: FleetClient) -> RenderableType:
    """The current table, or the error of a Router that does not answer, which does not end the watch."""
    try:
        return pools_table(await client.pools(), output_width())
    except RequestFailed as refused:
        return Group(Text(refused.message, style="red"))


def _age(milliseconds: int) -> str:
    seconds = milliseconds / 1000
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

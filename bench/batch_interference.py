"""Measure the effect of a saturating batch on interactive latency: TTFT with and without it, in one run.

``python -m bench.batch_interference`` starts a whole inferq with a batcher on the fake engine, sends
the same interactive streams in turns without and with a batch that fills every slot, and prints percentiles. A request
that finds all slots taken waits until one line of the batch has finished: the longest such wait is one line's time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table

from telemetry.environment import free_port
from tests.support.waiting import eventually

from .processes import new_folder, running, until_answers
from .systems import MODEL, System, fake_engine, whole_inferq
from .windows import Scenario, measured

TTFT_MS = 20.0
TOKENS_PER_S = 100
BATCH_LIMIT_S = 60.0
_POLL_S = 0.1


@asynccontextmanager
async def with_batcher(
    folder: Path, engine_url: str, slots: int, worker_options: Sequence[str] = ()
) -> AsyncIterator[System]:
    """A whole inferq that takes batches."""
    os.environ["INFERQ_STORAGE_URL"] = str(folder / "store")
    async with whole_inferq(folder, engine_url, slots=slots, worker_options=worker_options) as (system, queue_url):
        port, log = free_port(), folder / "batcher.log"
        options = ("--port", str(port), "--redis-url", queue_url, "--log-level", "warning")
        async with running("batches.service", options, log) as pid:
            await until_answers(f"http://127.0.0.1:{port}/readyz", log)
            yield System(system.name, system.port, {**system.pids, "batcher": pid})


class Batch:
    """A batch that fills every slot until it is cancelled."""

    def __init__(self, session: aiohttp.ClientSession, lines: int, tokens: int) -> None:
        self._session = session
        self._lines = lines
        self._tokens = tokens
        self._id = ""

    async def start(self, slots: int) -> None:
        """Returns once it has finished as many lines as there are slots."""
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", self._input(), filename="lines.jsonl")
        async with self._session.post("/v1/files", data=form) as answer:
            answer.raise_for_status()
            file_id = (await answer.json())["id"]
        fields = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        async with self._session.post("/v1/batches", json=fields) as answer:
            answer.raise_for_status()
            self._id = (await answer.json())["id"]
        await self._until(
            lambda batch: batch["request_counts"]["completed"] >= slots, "has finished a line in each slot"
        )

    async def running(self) -> bool:
        """Whether it still has lines to run."""
        batch = await self._poll()
        return str(batch["status"]) == "in_progress"

    async def completed(self) -> int:
        """How many lines it has finished."""
        return int((await self._poll())["request_counts"]["completed"])

    async def stop(self) -> int:
        """Cancel it; how many lines it had finished."""
        async with self._session.post(f"/v1/batches/{self._id}/cancel") as answer:
            answer.raise_for_status()
        batch = await self._until(lambda batch: batch["status"] == "cancelled", "is cancelled")
        return int(batch["request_counts"]["completed"])

    async def _until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        async def matching() -> dict[str, Any] | None:
            batch = await self._poll()
            return batch if condition(batch) else None

        found: dict[str, Any] | None = await eventually(
            matching, f"the batch {what}", limit_s=BATCH_LIMIT_S, every_s=_POLL_S
        )
        assert found is not None
        return found

    async def _poll(self) -> dict[str, Any]:
        async with self._session.get(f"/v1/batches/{self._id}") as answer:
            answer.raise_for_status()
            return dict(await answer.json())

    def _input(self) -> bytes:
        body: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me of the sea."}]}
        body |= {"max_tokens": self._tokens, "ignore_eos": True}
        line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        return b"".join(json.dumps({"custom_id": str(n), **line}).encode() + b"\n" for n in range(self._lines))


async def _all(options: argparse.Namespace, console: Console) -> None:
    line_ms = TTFT_MS + options.tokens / TOKENS_PER_S * 1000
    streams = Scenario(
        name="interactive streams",
        clients=options.clients,
        seconds=options.seconds,
        stream=True,
        per="token",
        delay_us=int(TTFT_MS * 1000),
        interval_us=1_000_000 // TOKENS_PER_S,
    )
    firsts: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    lines_run = 0
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        folder = Path(name)
        async with (
            fake_engine(new_folder(folder / "engine"), "--delay-us", str(int(line_ms * 1000))) as (port, _),
            with_batcher(new_folder(folder / "inferq"), f"http://127.0.0.1:{port}", options.slots) as system,
            aiohttp.ClientSession(f"http://127.0.0.1:{system.port}") as session,
        ):
            for number in range(options.rounds):
                alone = await measured(streams, system, number)
                batch = Batch(session, options.lines, options.tokens)
                await batch.start(options.slots)
                beside = await measured(streams, system, number)
                if not await batch.running():
                    raise TimeoutError("the batch ended before the streams did: give it more --lines")
                lines_run += await batch.stop()
                for way, one in (("without", alone), ("with", beside)):
                    firsts[way].append({name: value / 1000 for name, value in one.load.first_us.items()})
                console.print(f"round {number + 1}  TTFT without {firsts['without'][-1]}  with {firsts['with'][-1]}")
    _print(firsts, line_ms, lines_run, options, console)


def _print(
    firsts: dict[str, list[dict[str, float]]],
    line_ms: float,
    lines_run: int,
    options: argparse.Namespace,
    console: Console,
) -> None:
    table = Table(title=f"Time to first token in ms; {options.slots} slots, a line of the batch takes {line_ms:g} ms")
    for column in ("", "p50", "p90", "p99"):
        table.add_column(column, justify="right")
    medians = {
        name: {p: statistics.median(one[p] for one in rounds) for p in ("p50", "p90", "p99")}
        for name, rounds in firsts.items()
    }
    for name, found in medians.items():
        table.add_row(f"{name} a batch", *(f"{value:,.1f}" for value in found.values()))
    added = {p: medians["with"][p] - medians["without"][p] for p in ("p50", "p90", "p99")}
    table.add_row("added", *(f"{value:,.1f}" for value in added.values()))
    table.add_row("of a line's time", *(f"{value / line_ms:.2f}" for value in added.values()))
    console.print(table)
    console.print(f"{lines_run} lines of batches ran beside")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.batch_interference", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each load")
    parser.add_argument("--clients", type=int, default=4, help="interactive streams at a time")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--lines", type=int, default=5_000, help="lines of each batch, which is cancelled in the end")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of each line's answer")
    uvloop.run(_all(parser.parse_args(argv), Console(width=120)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

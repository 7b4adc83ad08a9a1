"""A batch beside posting the same lines directly, as ``vllm run-batch`` does: one engine, one run, a ratio.

``python -m bench.batch`` starts the fake engine and a whole inferq with a batcher on it. Directly means: read the
file, keep so many requests in flight on connections that stay open, write each answer as a line. It survives nothing;
the batch survives everything, and its time runs from its creation to its end, validation and files included. In turns,
several rounds; ``instant`` is an engine that takes no time (what the machinery costs), ``busy`` one that takes 340 ms
for a line (whether it ever waits).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from .processes import new_folder
from .systems import MODEL, fake_engine, with_batcher

ENGINES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "instant": ((), 64, 20_000),
    "busy": (("--delay-us", "340000"), 128, 8_000),
}
"""By name: the engine's options, requests in flight (slots of the worker, connections of the direct way), lines."""
PATH = "/v1/chat/completions"
LIMIT_S = 300.0
_POLL_S = 0.05


def lines_of(count: int) -> Iterator[bytes]:
    """The input: short questions, 32 tokens of answer."""
    for number in range(count):
        messages = [{"role": "user", "content": f"Tell me of the number {number}, and of the sea."}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 32, "ignore_eos": True}
        yield json.dumps({"custom_id": str(number), "method": "POST", "url": PATH, "body": body}).encode() + b"\n"


async def directly(engine_url: str, source: Path, target: Path, clients: int) -> float:
    """Post every line to the engine; the seconds until the last answer is written."""
    begun = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=clients)
    with source.open("rb") as lines, target.open("wb") as answers:
        async with aiohttp.ClientSession(engine_url, connector=connector) as session:

            async def post() -> None:
                for line in lines:
                    request = orjson.loads(line)
                    headers = {"content-type": "application/json"}
                    async with session.post(PATH, data=orjson.dumps(request["body"]), headers=headers) as answer:
                        body = await answer.read()
                        answer.raise_for_status()
                    response = {"status_code": answer.status, "request_id": "", "body": orjson.loads(body)}
                    result = {"id": "", "custom_id": request["custom_id"], "response": response, "error": None}
                    answers.write(orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE))

            await asyncio.gather(*(post() for _ in range(clients)))
    return time.perf_counter() - begun


async def as_a_batch(session: aiohttp.ClientSession, source: Path, lines: int) -> float:
    """Run the file as a batch; the seconds from its creation to its end."""
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", source.read_bytes(), filename="lines.jsonl")  # noqa: ASYNC240 - before the time counts
    file_id = (await _answer(session, "POST", "/v1/files", data=form))["id"]
    request = {"input_file_id": file_id, "endpoint": PATH, "completion_window": "24h"}
    begun = time.perf_counter()
    batch = await _answer(session, "POST", "/v1/batches", json=request)
    while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
        if time.perf_counter() - begun > LIMIT_S:
            raise TimeoutError(f"the batch did not end within {LIMIT_S:g} s: {batch}")
        await asyncio.sleep(_POLL_S)
        batch = await _answer(session, "GET", f"/v1/batches/{batch['id']}")
    took = time.perf_counter() - begun
    if batch["request_counts"]["completed"] != lines:
        raise ValueError(f"not every line was answered: {batch}")
    return took


async def _answer(session: aiohttp.ClientSession, method: str, path: str, **options: Any) -> dict[str, Any]:
    async with session.request(method, path, **options) as answer:
        answer.raise_for_status()
        return dict(await answer.json())


async def _all(options: argparse.Namespace, console: Console) -> None:
    table = Table("engine", "in flight", "lines", "directly, lines/s", "as a batch, lines/s", "ratio")
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        for engine in options.engines:
            engine_options, clients, lines = ENGINES[engine]
            lines = options.lines or lines
            folder = new_folder(Path(name) / engine)
            source = folder / "lines.jsonl"
            source.write_bytes(b"".join(lines_of(lines)))
            rates: dict[str, list[float]] = {"directly": [], "batch": []}
            async with fake_engine(new_folder(folder / "engine"), *engine_options) as (port, _):
                url = f"http://127.0.0.1:{port}"
                async with (
                    with_batcher(new_folder(folder / "inferq"), url, slots=clients) as (system, _),
                    aiohttp.ClientSession(f"http://127.0.0.1:{system.port}") as session,
                ):
                    for number in range(options.rounds):
                        rates["directly"].append(lines / await directly(url, source, folder / "out.jsonl", clients))
                        rates["batch"].append(lines / await as_a_batch(session, source, lines))
                        both = f"directly {rates['directly'][-1]:,.0f}/s  as a batch {rates['batch'][-1]:,.0f}/s"
                        console.print(f"round {number + 1}  {engine:8} {both}")
            ratio = statistics.median(b / d for b, d in zip(rates["batch"], rates["directly"], strict=True))
            shown = (f"{statistics.median(rates[way]):,.0f}" for way in ("directly", "batch"))
            table.add_row(engine, str(clients), f"{lines:,}", *shown, f"{ratio:.2f}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.batch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lines", type=int, default=0, help="lines of the batch; each engine has its own number")
    parser.add_argument("--engine", action="append", dest="engines", choices=list(ENGINES), help="one; repeatable")
    options = parser.parse_args(argv)
    options.engines = options.engines or list(ENGINES)
    uvloop.run(_all(options, Console(width=120)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Speak with a submitter: a child process that takes a line and answers with a JSON object."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ..processes import ROOT

ANSWER_LIMIT_S = 400.0


class SubmitterFailed(Exception):
    """It ended, or did not answer; the message has what it said."""


class Submitter:
    """One that runs."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    async def ask(self, order: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Its answer to ``order``; without one, its next line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if order is not None:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            await self._process.stdin.drain()
        async with asyncio.timeout(ANSWER_LIMIT_S):
            line = await self._process.stdout.readline()
        if not line:
            raise SubmitterFailed(f"the submitter ended: {self._log.read_text('utf-8', 'replace')[-2000:]}")
        answer: dict[str, float] = json.loads(line)
        return answer


@asynccontextmanager
async def submitter(
    command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None
) -> AsyncIterator[Submitter]:
    """Run ``command`` as a submitter, its error output in ``log``, until the block ends."""
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *map(str, command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=env,
            cwd=ROOT,
        )
    try:
        yield Submitter(process, log)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        if process.returncode is None:
            process.kill()
        await process.wait()

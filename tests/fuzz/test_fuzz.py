"""A short run of the fuzzer: in every change's tests. Longer ones: ``make fuzz SECONDS=600``."""

from __future__ import annotations

from pathlib import Path

import pytest

from .run import run_fuzz

SEED, SECONDS = 7, 15.0
MIN_INPUTS = 10_000


@pytest.mark.timeout(120)
async def test_no_input_ends_a_process_or_makes_it_grow(tmp_path: Path) -> None:
    """Whatever arrives at any edge is answered or refused: no process ends, no answer is a 500, memory stays flat, and
    the fleet serves afterwards."""
    outcome = await run_fuzz(tmp_path, seconds=SECONDS, seed=SEED)
    print(outcome.table())
    assert not outcome.findings, "\n\n".join([*outcome.findings, f"again: make fuzz SECONDS={SECONDS:g} SEED={SEED}"])
    assert outcome.total > MIN_INPUTS
    live = ("HTTP bytes", "HTTP bodies", "control-plane requests", "stream entries")
    assert all(outcome.counts[edge] for edge in live)

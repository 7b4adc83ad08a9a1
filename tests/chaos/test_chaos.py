"""Run chaos briefly with every change. Longer runs: ``make chaos``, ``make chaos-long``."""

from __future__ import annotations

from pathlib import Path

import pytest

from .report import describe_violations, table
from .run import run_chaos

SEED, SECONDS = 7, 45.0


@pytest.mark.timeout(240)
async def test_nothing_is_lost_doubled_or_spliced_while_everything_is_killed(tmp_path: Path) -> None:
    """Under load, each role is killed and hung, Redis is, replies are lost after commit, packets vanish, the disk is
    full: every request that was taken is answered once, as if nothing had happened, or ends with an error that a fault
    of ours explains; a worker's death is noticed in time, its streams go on, and nothing is left behind."""
    outcome = await run_chaos(tmp_path, seed=SEED, seconds=SECONDS)
    print(table(outcome.verdict, f"{SECONDS:g} s, seed {SEED}"))
    assert not outcome.verdict.violations, (
        f"{describe_violations(outcome.verdict, outcome.entries)}\nagain: make chaos SECONDS={SECONDS:g} SEED={SEED}"
    )

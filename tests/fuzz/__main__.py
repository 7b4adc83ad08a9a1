"""``python -m tests.fuzz --seconds 60 [--seed 7]``."""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
from pathlib import Path

from .run import run_fuzz


def main() -> int:
    """Run once and print the counts; the exit code is 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Odd inputs at every edge, counted.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument("--seed", type=int, default=None, help="drawn if not given")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    print(f"seed {seed}: make fuzz SECONDS={options.seconds:g} SEED={seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="inferq-fuzz-"))
    outcome = asyncio.run(run_fuzz(folder, seconds=options.seconds, seed=seed))
    print(outcome.table())
    if outcome.findings:
        print(f"\n{len(outcome.findings)} findings; logs: {folder}", *outcome.findings, sep="\n\n")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

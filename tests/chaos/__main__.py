"""``python -m tests.chaos --seconds 60 --seed 7 [--markdown docs/reliability.md]``."""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
from pathlib import Path

from .report import commit, describe_violations, table, write_into
from .run import run_chaos


def main() -> int:
    """Run once and print the result; the exit code is 1 if a promise was broken."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description="Inject faults drawn from a seed, under load."
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="drawn if not given")
    parser.add_argument("--markdown", type=Path, default=None, help="page whose table is written anew")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    replay = f"make chaos SECONDS={options.seconds:g} SEED={seed}"
    print(f"seed {seed}: {replay}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="inferq-chaos-"))
    outcome = asyncio.run(run_chaos(folder, seed=seed, seconds=options.seconds))
    title = f"{options.seconds:g} s, seed {seed}, commit {commit()}"
    print(table(outcome.verdict, title))
    if outcome.verdict.violations:
        print(describe_violations(outcome.verdict, outcome.entries))
        print(f"\nlogs and history: {folder}\nagain: {replay}")
        return 1
    if options.markdown is not None:
        write_into(options.markdown, outcome.verdict, title)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

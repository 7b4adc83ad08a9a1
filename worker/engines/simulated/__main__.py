"""Run the simulated engine as a process: ``python -m worker.engines.simulated``."""

import sys

from .server import main

if __name__ == "__main__":
    sys.exit(main())

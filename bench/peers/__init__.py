"""What inferq is measured beside, in a virtual environment of its own: never among the project's dependencies.

``requirements.txt`` has the pinned versions, ``requirements-litellm.txt`` those that only ``--litellm`` needs. The
environment is made in ``.inferq/bench`` on demand, and again when those files change.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_FOLDER = _HERE.parents[1] / ".inferq" / "bench"
INSTALL_LIMIT_S = 900.0


class NotInstalled(Exception):
    """The peers cannot be installed here; the message says why."""


def python(extra: str = "") -> Path:
    """The interpreter of the environment that has the peers, made if need be. ``extra`` names further requirements."""
    return _installed(extra) / "bin" / "python"


def program(name: str, extra: str = "") -> Path:
    """A command of that environment."""
    found = _installed(extra) / "bin" / name
    if not found.exists():
        raise NotInstalled(f"its packages brought no command {name}")
    return found


def environment() -> dict[str, str]:
    """What peers are started with: nothing that speaks to inferq or to Python's own set-up."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("INFERQ_", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"))
    }


@cache
def _installed(extra: str) -> Path:
    """Raises ``NotInstalled``, and remembers nothing of it: the next run tries again."""
    requirements = _HERE / (f"requirements-{extra}.txt" if extra else "requirements.txt")
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = _FOLDER / f"peers-{f'{extra}-' if extra else ''}{digest}"
    done = folder / ".installed"
    if not done.exists():
        print(f"installing {requirements.name} into {folder}, once", file=sys.stderr, flush=True)
        try:
            venv.create(folder, with_pip=True, clear=True)
            subprocess.run(
                [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-input", "-r", requirements],
                capture_output=True,
                text=True,
                check=True,
                timeout=INSTALL_LIMIT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
            why = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else repr(error))
            raise NotInstalled(f"{requirements.name} cannot be installed: {why[:300]}") from error
        done.touch()
    return folder

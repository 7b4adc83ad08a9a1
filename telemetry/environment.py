"""The environment for other programs (engines, Ray): this process's, without inferq's settings and secrets."""

from __future__ import annotations

import os

_OURS = "INFERQ_"


def foreign_environment() -> dict[str, str]:
    """This process's environment without every ``INFERQ_*`` variable, in whichever case: settings are read in any."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(_OURS)}

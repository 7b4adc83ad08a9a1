"""What is decided about webhooks without touching the world: signatures, when to send again, what is sent next."""

from __future__ import annotations

from .fair_order import Limits, next_turns
from .progress import begin, conclude, give_up
from .schedule import WAITS_S, max_tries, wait_s
from .signing import signed_headers

__all__ = [
    "WAITS_S",
    "Limits",
    "begin",
    "conclude",
    "give_up",
    "max_tries",
    "next_turns",
    "signed_headers",
    "wait_s",
]

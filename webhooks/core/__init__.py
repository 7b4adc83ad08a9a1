"""Decisions about webhooks, without I/O: which URLs are allowed, what is sent next, when to retry, how to sign."""

from __future__ import annotations

from .fair_order import Limits, choose_next
from .progress import begin, conclude, give_up
from .schedule import WAITS_S, max_tries, wait_s
from .signing import signed_headers

__all__ = [
    "WAITS_S",
    "Limits",
    "begin",
    "choose_next",
    "conclude",
    "give_up",
    "max_tries",
    "signed_headers",
    "wait_s",
]

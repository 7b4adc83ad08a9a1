"""The error of a request whose time ran out: it names the limit, and what set it."""

from __future__ import annotations

from .errors import DeadlineExceeded


def deadline_passed(where: str, limit: str) -> DeadlineExceeded:
    """``where`` says where the time ran out ("in the queue"); ``limit`` is the job's ``deadline_from``."""
    named = f" of {limit}" if limit else ""
    return DeadlineExceeded(
        f"the request's time{named} ran out {where}; the same request would end the same way: allow it more time "
        "(x-inferq-deadline-ms, or the client's own time-out), or ask for less"
    )

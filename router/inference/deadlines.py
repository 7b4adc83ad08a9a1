"""How long a request may take, and what set that limit: the caller, its client's own time-out, or a setting."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .rules import DEADLINE_HEADER, read_deadline

DEFAULT_SETTING = "INFERQ_ROUTER_DEFAULT_DEADLINE_MS"
MAX_SETTING = "INFERQ_ROUTER_MAX_DEADLINE_MS"
READ_TIMEOUT_HEADER = "x-stainless-read-timeout"
"""Seconds for which openai and anthropic for Python wait for the next byte: of a plain answer, for all of it."""
WHOLE_TIMEOUT_HEADER = "x-stainless-timeout"
"""The same of openai for Node, in whole seconds, rounded down: the earliest that the client may give up."""
_SECONDS = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_EARLIER_PART, _MAX_EARLIER_S = 0.1, 2.0
"""How much earlier than its client's time-out a request ends here. A client that hears why it failed does not repeat a
request that would fail again; one that gave up by itself does, by default twice."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """``limit_ms`` from now on; ``named`` says so for people, with what set it. ``patience_s``: for how long after it
    the client still waits to hear of it."""

    limit_ms: int
    named: str
    patience_s: float = float("inf")


def client_timeout_s(headers: Mapping[bytes, bytes]) -> tuple[float, str] | None:
    """How long the client itself waits, in s, and the header that says so; None if none does."""
    given = headers.get(READ_TIMEOUT_HEADER.encode())
    if given is not None and _SECONDS.fullmatch(given) and float(given) > 0:
        return float(given), READ_TIMEOUT_HEADER
    given = headers.get(WHOLE_TIMEOUT_HEADER.encode())
    if given is not None and given.isdigit() and len(given) < 10:
        return max(1.0, float(given)), WHOLE_TIMEOUT_HEADER
    return None


def find_deadline(
    headers: Mapping[bytes, bytes], timeout_s: float | None, default_ms: int, max_ms: int, *, waits: bool
) -> Deadline:
    """The deadline of a request: its ``x-inferq-deadline-ms``, or else the ``timeout`` of its body, or else the
    time-out of its client, or else ``default_ms``; at most ``max_ms``.

    ``waits``: it ends when its client's time-out does, because nothing is sent before the whole answer and nobody reads
    it later. Otherwise a client's time-out only makes the default longer. Raises ``BadRequest``.
    """
    given = headers.get(DEADLINE_HEADER.encode())
    limit_ms = read_deadline(given, timeout_s, default_ms, max_ms)
    patience_s = float("inf")
    if given is not None:
        source, asked_ms = DEADLINE_HEADER, float(given)
    elif timeout_s is not None:
        source, asked_ms = "timeout in the request's body", timeout_s * 1000
    else:
        source, asked_ms = DEFAULT_SETTING, float(default_ms)
        client = client_timeout_s(headers)
        if client is not None:
            seconds, header = client
            ends_ms = max(1.0, 1000 * (seconds - min(_MAX_EARLIER_S, seconds * _EARLIER_PART)))
            if waits or ends_ms > default_ms:
                source, asked_ms = f"the client's time-out, {header}", ends_ms
                if waits:
                    patience_s = (seconds - ends_ms / 1000) / 2
        limit_ms = max(1, int(min(asked_ms, max_ms)))
    if asked_ms > max_ms:
        source, patience_s = MAX_SETTING, float("inf")
    return Deadline(limit_ms, f"{limit_ms} ms (set by {source})", patience_s)

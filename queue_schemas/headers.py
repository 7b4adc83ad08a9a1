"""The HTTP headers that pass through the fabric: one allowlist in each direction, both bounded.

From a client to the engine: what belongs to the trace and to the version of the API. From the engine to the client:
what an SDK acts upon, and what is needed to read the body. All else stays where it came from; above all credentials,
cookies and what belongs to one connection (RFC 9110, 7.6.1). ``baggage`` is not passed on: its content is the caller's,
and no engine reads it. ``traceparent`` is a field of its own in a job, because the fabric's spans replace it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

ENGINE_HEADERS = frozenset({"tracestate", "anthropic-version", "anthropic-beta", "openai-beta"})
"""Of a request, passed to the engine."""
CLIENT_HEADERS = frozenset(
    {
        *("retry-after", "retry-after-ms", "x-should-retry"),
        "metadata",  # vLLM: how embeddings of encoding_format bytes lie in the body
        *("content-disposition", "content-language"),
        *("openai-model", "openai-processing-ms", "openai-version"),
        *("x-ratelimit-limit-requests", "x-ratelimit-limit-tokens", "x-ratelimit-remaining-requests"),
        *("x-ratelimit-remaining-tokens", "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"),
    }
)
"""Of an answer, passed to the client."""
_RAW_ENGINE_HEADERS = frozenset(name.encode() for name in ENGINE_HEADERS)
MAX_REQUEST_BYTES = 4 * 1024
MAX_ANSWER_BYTES = 48 * 1024
"""``metadata`` grows with the number of inputs; what a worker accepts as a whole head is little more than this."""
MAX_TRACESTATE_MEMBERS, MAX_TRACESTATE_LENGTH = 32, 512
"""W3C Trace Context, 3.3.1: what every participant has to pass on, at least and at most."""
_SENDABLE = re.compile(r"[\x20-\x7e]*")


def for_engine(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Those of a request's raw ``headers`` (names in lower case) that its engine is to see."""
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        if raw_name in _RAW_ENGINE_HEADERS:
            name = raw_name.decode("latin-1")
            value = raw_value.decode("latin-1").replace("\t", " ").strip()
            found[name] = f"{found[name]},{value}" if name in found else value
    if not found:
        return found
    if "tracestate" in found:
        found["tracestate"] = _shortened(found["tracestate"])
    return _bounded(found, ENGINE_HEADERS, MAX_REQUEST_BYTES)


def for_client(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of an engine's ``headers`` (names in lower case) that its client is to see."""
    return _bounded(headers, CLIENT_HEADERS, MAX_ANSWER_BYTES)


def read_headers(value: Any, allowed: frozenset[str], limit_bytes: int) -> dict[str, str]:
    """Headers out of a message that another process wrote: what is not allowed, or no text, is left out."""
    if type(value) is not dict or not value:
        return {}
    texts = {name: text for name, text in value.items() if type(name) is str and type(text) is str}
    return _bounded(texts, allowed, limit_bytes)


def retry_after_s(value: str, now_s: float) -> float | None:
    """Seconds that a ``Retry-After`` (RFC 9110, 10.2.3) asks for: a number of them or a date, which is GMT whether it
    says so or not. None if it is neither. ``now_s`` is Unix time."""
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now_s)
    except (ValueError, OverflowError):
        return None


def _bounded(headers: Mapping[str, str], allowed: frozenset[str], limit_bytes: int) -> dict[str, str]:
    kept: dict[str, str] = {}
    size = 0
    for name, value in headers.items():
        if name not in allowed or not value or not _SENDABLE.fullmatch(value):
            continue
        size += len(name) + len(value) + 4
        if size > limit_bytes:
            break
        kept[name] = value
    return kept


def _shortened(tracestate: str) -> str:
    """As many of the newest members, which come first, as the limits permit."""
    members = [member.strip() for member in tracestate.split(",") if member.strip()]
    if len(",".join(members)) > MAX_TRACESTATE_LENGTH:  # long members go first, as the standard advises
        members = [member for member in members if len(member) <= 128]
    members = members[:MAX_TRACESTATE_MEMBERS]
    while members and len(",".join(members)) > MAX_TRACESTATE_LENGTH:
        members.pop()
    return ",".join(members)

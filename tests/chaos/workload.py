"""Build the clients' requests: path, headers and body from a number and a kind. Every right answer is known.

The engines echo: a chat answers its last message, a completion its prompt. So each request asks for a text of cells
that name it (:func:`tests.support.traffic.cells_text`). A chat also has a canary, its tenant's secret, which must not
appear anywhere else.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.traffic import cells_text
from worker.engines.simulated import chat_prompt

MODEL = "sim"
TENANTS = ("acme", "globex", "initech")
POISON, IMPATIENT, MALFORMED, GARBAGE = "poison", "hurried", "malformed", "engine garbage"
ENGINE_ERROR = "engine error"
BACKGROUND = "keyed background chat"
BACKGROUND_CELLS = 100
"""They take so long that the slots are full, and some yield to the others."""
KINDS = (
    "chat stream", "chat stream", "chat stream", "completion stream", "completion stream", "chat", "chat", "completion",
    "embedding", "leaver", "slow reader stream", "deadline", ENGINE_ERROR, "engine breaks stream", GARBAGE,
    "keyed chat stream", "keyed chat",
)  # fmt: skip
"""Every client draws from these. Some order one failure of an engine, or garbage."""
MAX_COMPLETION_CELLS = 60
"""Cells repeat after 62 places; an echoed prompt that repeats itself looks like one that is half answered."""
NAMES = 62**3
POISON_CELLS = 60
"""More than all its attempts can produce together."""
RECONNECT_SHARE, TWIN_SHARE = 0.3, 0.3
"""Of requests with a key: the share of streams whose client reconnects, and the share sent twice at once."""
PRIORITIES = (None, None, None, 0, -20, -5, 10)
_ORDERS: Mapping[str, dict[str, Any]] = {
    ENGINE_ERROR: {"fail": 500, "times": 1, "on": "worker-1"},
    "engine breaks stream": {"fail": "close_midstream", "after_tokens": 3, "times": 1, "on": "worker-2"},
    GARBAGE: {"fail": "garbage"},
    POISON: {"fail": "crash", "after_tokens": 3},
}
_DEEP = b'{"model": "sim", "messages": ' + b"[" * 2_000 + b"]" * 2_000 + b"}"
_MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b'{"model": "sim"',
    b'{"model": 7}',
    b'{"model": "sim", "stream": "yes"}',
    b"[" * 5_000,
    _DEEP,
    b"\xff\xfe\x00",
    b'{"model": "no-such-model", "messages": []}',
    b'{"model": "sim", "messages": "' + b"x" * (5 << 20) + b'"}',
)


@dataclass(frozen=True, slots=True)
class OutgoingRequest:
    """One request before it is sent. Its client disconnects after ``leave_after_cells`` cells or ``leave_after_s``
    seconds, and takes ``pause_s`` to read each event. With an idempotency ``key`` it retries until there is an answer;
    with ``twin`` it sends to both Routers at once. ``other_body`` is a body that must be refused under the same key."""

    kind: str
    cells: int
    path: str
    body: bytes
    headers: dict[str, str]
    tenant: str
    deadline_s: float = 0.0
    on_loss: str = ""
    leave_after_cells: int | None = None
    leave_after_s: float | None = None
    pause_s: float = 0.0
    key: str = ""
    twin: bool = False
    other_body: bytes = b""


def make_request(number: int, kind: str, rng: random.Random) -> OutgoingRequest:
    """Request ``number`` of ``kind``; everything else is drawn from ``rng``."""
    streams = "stream" in kind or kind in ("leaver", IMPATIENT) or (kind == POISON and rng.random() < 0.5)
    cells = rng.choice((8, 20, 60, 120)) if streams else rng.choice((4, 12, 30))
    if kind.startswith("completion"):
        cells = min(cells, MAX_COMPLETION_CELLS)
    if kind in (POISON, BACKGROUND):
        cells = POISON_CELLS if kind == POISON else BACKGROUND_CELLS
    tenant = TENANTS[number % len(TENANTS)]
    headers = {
        "authorization": f"Bearer {tenant}",
        "content-type": "application/json",
        "x-request-id": request_id(number),
    }
    if kind == BACKGROUND:
        headers["x-inferq-background"] = "true"
    deadline_ms = rng.choice((1, 50, 300)) if kind == "deadline" else 0
    if deadline_ms:
        headers["x-inferq-deadline-ms"] = str(deadline_ms)
    on_loss = rng.choice(("", "", "", "", "restart", "fail")) if kind in ("chat stream", "completion stream") else ""
    if on_loss:
        headers["x-inferq-on-loss"] = on_loss
    path, body = _body(number, kind, cells, tenant, rng, streams=streams)
    keyed = kind.startswith("keyed")
    if keyed:
        headers["idempotency-key"] = request_id(number)
    reconnects = keyed and streams and rng.random() < RECONNECT_SHARE
    return OutgoingRequest(
        kind, cells, path, body, headers, tenant, deadline_ms / 1000, on_loss,
        leave_after_cells=rng.randrange(cells) if kind == "leaver" or reconnects else None,
        leave_after_s=rng.uniform(0.0, 0.3) if kind == IMPATIENT else None,
        pause_s=0.02 if kind == "slow reader stream" else 0.0,
        key=request_id(number) if keyed else "",
        twin=keyed and kind != BACKGROUND and rng.random() < TWIN_SHARE,
        other_body=_body(number + 1, kind, cells, tenant, rng, streams=streams)[1] if keyed else b"",
    )  # fmt: skip


def text_of(number: int, cells: int) -> str:
    """What request ``number`` asks, and must be answered. Names are used again after a quarter of a million."""
    return cells_text(name_of(number), cells)


def name_of(number: int) -> int:
    """The number that the cells contain."""
    return number % NAMES


def request_id(number: int) -> str:
    """What request ``number`` is called, by its client and in the logs."""
    return f"chaos-{number}"


def canary(number: int, tenant: str) -> str:
    """A secret that only the tenant and its engine may see."""
    return f"canary.{tenant}.{hashlib.sha256(str(number).encode()).hexdigest()[:12]}"


def prompt_of(number: int, kind: str, cells: int, tenant: str) -> str:
    """The prompt of a request, as its engine counts it."""
    text = text_of(number, cells)
    if kind.startswith("completion"):
        return text
    return chat_prompt([("system", canary(number, tenant)), ("user", text)])


def _body(number: int, kind: str, cells: int, tenant: str, rng: random.Random, *, streams: bool) -> tuple[str, bytes]:
    if kind == MALFORMED:
        return "/v1/chat/completions", rng.choice(_MALFORMED)
    text = text_of(number, cells)
    if kind == "embedding":
        return "/v1/embeddings", json.dumps({"model": MODEL, "input": text}).encode()
    fields: dict[str, Any] = {"model": MODEL}
    if (priority := rng.choice(PRIORITIES)) is not None:
        fields["priority"] = priority
    if streams:
        fields |= {"stream": True, "stream_options": {"include_usage": rng.random() < 0.7}}
    if kind in _ORDERS:
        fields["sim"] = _ORDERS[kind]
    if kind.startswith("completion"):
        return "/v1/completions", json.dumps(fields | {"prompt": text, "max_tokens": cells}).encode()
    fields["messages"] = [
        {"role": "system", "content": canary(number, tenant)},
        {"role": "user", "content": text},
    ]
    return "/v1/chat/completions", json.dumps(fields).encode()

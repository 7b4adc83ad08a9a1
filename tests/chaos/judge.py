"""What a client may never have seen, whatever was done to the fleet: pure, one request at a time.

A right answer is known beforehand: each token names its request and its place (:mod:`tests.support.traffic`), the usage
follows from the prompt, a vector from model and text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.support.traffic import Outcome, judge
from worker.engines.simulated.api.answers import embedding
from worker.engines.simulated.tokens import count_tokens

from .asks import GARBAGE, MALFORMED, MODEL, POISON, name_of, prompt_of, request_id, text_of
from .history import Request

DIMENSIONS = 16
"""Of the fleet's vectors."""
LOSS, DUPLICATE, SPLICE = "no loss", "no duplicate", "no splice"
ISOLATION, POISON_BOUND, IDEMPOTENCY = "isolation", "poison bound", "idempotency"
REUSED, SERVER_ERROR = 422, 500


@dataclass(frozen=True, slots=True)
class Wrong:
    """The promise that was broken, and how."""

    promise: str
    what: str


def seen_wrong(request: Request) -> Wrong | None:
    """The first thing that is wrong about what a client saw; None if nothing is."""
    if request.kind == MALFORMED:
        return None
    for look in (_wrong_name, _canary, _wrong_tries, _LOOKS.get(request.kind, _wrong_answer)):
        if wrong := look(request):
            return wrong
    return None


def _wrong_name(request: Request) -> Wrong | None:
    if not request.status or request.request_id == request_id(request.number):
        return None
    return Wrong(SPLICE, f"the answer is called {request.request_id}")


def _canary(request: Request) -> Wrong | None:
    seen = "canary." in request.text or "canary." in request.message
    return Wrong(ISOLATION, "a canary is in the answer") if seen else None


def _wrong_tries(request: Request) -> Wrong | None:
    """One key is one job: whoever asks again gets the beginning, or all, of the same answer."""
    ids = {*request.ids, *(one for told in request.tries for one in told["ids"])}
    if request.key and len(ids) > 1:
        return Wrong(IDEMPOTENCY, f"{len(ids)} answers under one key: {', '.join(sorted(ids))}")
    if request.reused and request.reused < SERVER_ERROR and request.reused != REUSED:
        return Wrong(IDEMPOTENCY, f"another body under the same key got status {request.reused}")
    for told in request.tries:
        outcome, reason = judge(told["text"], name_of(request.number), request.cells, whole=told["end"] == "answered")
        if outcome is not Outcome.RIGHT:
            return Wrong(SPLICE, f"another try under its key: {reason}")
    return None


def _wrong_answer(request: Request) -> Wrong | None:
    if request.status >= 400 and not request.text:
        return None
    whole = request.end == "answered"
    for look in (_wrong_text, _wrong_frame, *((_wrong_end,) if whole else ())):
        if wrong := look(request):
            return wrong
    return None


def _wrong_poison(request: Request) -> Wrong | None:
    if request.end == "answered":
        return Wrong(POISON_BOUND, "a request whose every attempt crashes its engine was answered")
    return _wrong_text(request)


def _wrong_garbage(request: Request) -> Wrong | None:
    if not request.text:
        return None
    return Wrong(SPLICE, f"{request.text[:80]!r} in place of an error: its engine's answer was garbage")


def _wrong_text(request: Request) -> Wrong | None:
    whole = request.end == "answered"
    if request.kind == "embedding":
        return _wrong_vector(request) if whole else None
    outcome, reason = judge(request.text, name_of(request.number), request.cells, whole=whole)
    if outcome is Outcome.RIGHT:
        return None
    if text_of(request.number, request.cells).startswith(request.text):
        return Wrong(LOSS, f"the answer ends early: {reason}")
    return Wrong(DUPLICATE if _repeats(request) else SPLICE, reason)


def _wrong_vector(request: Request) -> Wrong | None:
    wanted = embedding(text_of(request.number, request.cells), MODEL, 0, DIMENSIONS)
    close = all(abs(a - b) < 1e-6 for a, b in zip(request.vector, wanted, strict=False))
    return None if request.vector and close else Wrong(SPLICE, f"another vector: {request.vector[:3]}")


def _wrong_frame(request: Request) -> Wrong | None:
    if len(request.ids) > 1:
        return Wrong(SPLICE, f"{len(request.ids)} ids in one stream")
    if max(request.roles, len(request.finishes), request.done, request.usages) > 1:
        seen = f"{request.roles} roles, {request.finishes} finishes, {request.done} ends, {request.usages} usages"
        return Wrong(DUPLICATE, seen)
    return None


def _wrong_end(request: Request) -> Wrong | None:
    if request.streams and (request.done, len(request.finishes)) != (1, 1):
        return Wrong(LOSS, f"{request.done} ends, {len(request.finishes)} finishes")
    if request.usage and (wrong := _wrong_usage(request)):
        return Wrong(SPLICE, wrong)
    return None


def _repeats(request: Request) -> bool:
    cells = [request.text[at : at + 4] for at in range(0, len(request.text), 4)]
    mine = {cell for cell in cells if cell.startswith(text_of(request.number, 1)[:3])}
    return len(mine) < len(cells) and len(mine) == len(set(cells))


def _wrong_usage(request: Request) -> str:
    prompt = prompt_of(request.number, request.kind, request.cells, request.tenant)
    wanted = (count_tokens(prompt), request.cells)
    told = (request.usage.get("prompt_tokens"), request.usage.get("completion_tokens"))
    return "" if told == wanted else f"usage {told} where {wanted} is right"


_LOOKS: dict[str, Callable[[Request], Wrong | None]] = {GARBAGE: _wrong_garbage, POISON: _wrong_poison}

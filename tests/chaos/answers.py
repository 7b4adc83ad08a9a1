"""Find what no client may ever see in an answer, whatever the faults: pure, one request at a time.

The right answer is known beforehand: each token names its request and its place (:mod:`tests.support.traffic`), the
usage follows from the prompt, a vector from model and text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.support.traffic import Outcome, check_text
from worker.engines.simulated.api.answers import embedding
from worker.engines.simulated.simulation import engine_mark
from worker.engines.simulated.tokens import count_tokens

from .history import Request
from .plan import EXAMPLE_WORKER
from .workload import GARBAGE, MALFORMED, MODEL, POISON, name_of, prompt_of, request_id, text_of

DIMENSIONS = 16
"""Of the fleet's vectors."""
LOSS, DUPLICATE, SPLICE = "no loss", "no duplicate", "no splice"
ISOLATION, POISON_BOUND, IDEMPOTENCY = "isolation", "poison bound", "idempotency"
REUSED, SERVER_ERROR = 422, 500
BEGINS_ANEW = f"-{engine_mark(EXAMPLE_WORKER)}"
"""In the ids of answers from the engine whose worker cannot continue a stream."""


@dataclass(frozen=True, slots=True)
class WrongAnswer:
    """A broken promise, and how it was broken."""

    promise: str
    what: str


def find_fault(request: Request) -> WrongAnswer | None:
    """The first error in what a client saw; None if there is none."""
    if request.kind == MALFORMED:
        return None
    for check in (_wrong_name, _canary, _wrong_tries, _CHECKS.get(request.kind, _wrong_answer)):
        if wrong := check(request):
            return wrong
    return None


def _wrong_name(request: Request) -> WrongAnswer | None:
    if not request.status or request.request_id == request_id(request.number):
        return None
    return WrongAnswer(SPLICE, f"the answer is called {request.request_id}")


def _canary(request: Request) -> WrongAnswer | None:
    seen = "canary." in request.text or "canary." in request.message
    return WrongAnswer(ISOLATION, "a canary is in the answer") if seen else None


def _wrong_tries(request: Request) -> WrongAnswer | None:
    """One key is one job: every retry gets the beginning, or all, of the same answer. Its id is that of the attempt
    whose beginning is kept: it changes where a worker begins anew that cannot continue."""
    ids = {*request.ids, *(one for attempt in request.tries for one in attempt["ids"])}
    begun_anew = any(BEGINS_ANEW in one for one in ids)
    if request.key and len(ids) > 1 and not begun_anew:
        return WrongAnswer(IDEMPOTENCY, f"{len(ids)} answers under one key: {', '.join(sorted(ids))}")
    if request.reused and request.reused < SERVER_ERROR and request.reused != REUSED:
        return WrongAnswer(IDEMPOTENCY, f"another body under the same key got status {request.reused}")
    for attempt in request.tries:
        outcome, reason = check_text(
            attempt["text"], name_of(request.number), request.cells, whole=attempt["end"] == "answered"
        )
        if outcome is not Outcome.RIGHT:
            return WrongAnswer(SPLICE, f"another try under its key: {reason}")
    return None


def _wrong_answer(request: Request) -> WrongAnswer | None:
    if request.status >= 400 and not request.text:
        return None
    whole = request.end == "answered"
    for check in (_wrong_text, _wrong_frame, *((_wrong_end,) if whole else ())):
        if wrong := check(request):
            return wrong
    return None


def _wrong_poison(request: Request) -> WrongAnswer | None:
    if request.end == "answered":
        return WrongAnswer(POISON_BOUND, "a request whose every attempt crashes its engine was answered")
    return _wrong_text(request)


def _wrong_garbage(request: Request) -> WrongAnswer | None:
    if not request.text:
        return None
    return WrongAnswer(SPLICE, f"{request.text[:80]!r} in place of an error: its engine's answer was garbage")


def _wrong_text(request: Request) -> WrongAnswer | None:
    whole = request.end == "answered"
    if request.kind == "embedding":
        return _wrong_vector(request) if whole else None
    outcome, reason = check_text(request.text, name_of(request.number), request.cells, whole=whole)
    if outcome is Outcome.RIGHT:
        return None
    if text_of(request.number, request.cells).startswith(request.text):
        return WrongAnswer(LOSS, f"the answer ends early: {reason}")
    return WrongAnswer(DUPLICATE if _repeats(request) else SPLICE, reason)


def _wrong_vector(request: Request) -> WrongAnswer | None:
    wanted = embedding(text_of(request.number, request.cells), MODEL, 0, DIMENSIONS)
    close = all(abs(a - b) < 1e-6 for a, b in zip(request.vector, wanted, strict=False))
    return None if request.vector and close else WrongAnswer(SPLICE, f"another vector: {request.vector[:3]}")


def _wrong_frame(request: Request) -> WrongAnswer | None:
    if len(request.ids) > 1:
        return WrongAnswer(SPLICE, f"{len(request.ids)} ids in one stream")
    if max(request.roles, len(request.finishes), request.done, request.usages) > 1:
        seen = f"{request.roles} roles, {request.finishes} finishes, {request.done} ends, {request.usages} usages"
        return WrongAnswer(DUPLICATE, seen)
    return None


def _wrong_end(request: Request) -> WrongAnswer | None:
    if request.streams and (request.done, len(request.finishes)) != (1, 1):
        return WrongAnswer(LOSS, f"{request.done} ends, {len(request.finishes)} finishes")
    if request.usage and (wrong := _wrong_usage(request)):
        return WrongAnswer(SPLICE, wrong)
    return None


def _repeats(request: Request) -> bool:
    cells = [request.text[at : at + 4] for at in range(0, len(request.text), 4)]
    mine = {cell for cell in cells if cell.startswith(text_of(request.number, 1)[:3])}
    return len(mine) < len(cells) and len(mine) == len(set(cells))


def _wrong_usage(request: Request) -> str:
    prompt = prompt_of(request.number, request.kind, request.cells, request.tenant)
    wanted = (count_tokens(prompt), request.cells)
    attempt = (request.usage.get("prompt_tokens"), request.usage.get("completion_tokens"))
    return "" if attempt == wanted else f"usage {attempt} where {wanted} is right"


_CHECKS: dict[str, Callable[[Request], WrongAnswer | None]] = {GARBAGE: _wrong_garbage, POISON: _wrong_poison}

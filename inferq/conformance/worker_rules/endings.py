"""Rules about the end of a worker. Each ends it: the kit starts it anew for the next."""

from __future__ import annotations

import signal

from ..scorecard import Rule
from ..scripted_engine import whole_stream
from ..scripted_queue import chat
from ..worker_kit import WorkerKit
from .checks import check_answer, require


async def _ends(kit: WorkerKit, how: str) -> None:
    job = chat("slow 15", stream=True)
    attempt = await kit.begun(job)
    session_id = kit.router.session_id
    if how == "signal":
        kit.send(signal.SIGTERM)
    else:
        kit.queue.tell("drain")
    late = chat("plain late")
    kit.queue.waiting.append(late)
    code = await kit.ended(limit_s=30.0)
    require(code == 0, f"it ended with exit code {code}")
    check_answer(attempt, whole_stream(15), content_type="text/event-stream")
    require(session_id in kit.router.seen.left, "it did not leave: DELETE of its session never came")
    handed_back = not late.attempts or bool(late.last.settles or late.last.releases)
    require(handed_back, "a job that it claimed as it ended was neither run nor handed back")


async def _on_drain(kit: WorkerKit) -> None:
    await _ends(kit, "message")


async def _on_signal(kit: WorkerKit) -> None:
    await _ends(kit, "signal")


ENDING_RULES: tuple[Rule[WorkerKit], ...] = (
    Rule("sigterm", "after SIGTERM it lets its jobs end, leaves and ends", _on_signal),
    Rule("drain", "the same when it is told to drain", _on_drain),
)

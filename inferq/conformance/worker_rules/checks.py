"""What several rules look at."""

from __future__ import annotations

from queue_schemas import Outcome

from ..scorecard import Broken
from ..scripted_queue import Attempt


def require(holds: bool, problem: str) -> None:
    """Raise ``Broken`` that says ``problem`` unless it ``holds``."""
    if not holds:
        raise Broken(problem)


def check_answer(attempt: Attempt, expected: bytes, *, status: int = 200, content_type: str = "") -> None:
    """The attempt was settled once, with this answer."""
    require(bool(attempt.settles), f"the job was released ({_reason(attempt)}), not settled")
    require(len(attempt.settles) == 1, "the attempt was settled more than once")
    outcome = Outcome.DONE if status < 400 else Outcome.FAILED
    require(attempt.settles[0].outcome is outcome, f"the outcome is {attempt.settles[0].outcome}, not {outcome}")
    require(len(attempt.heads) >= 1, "no piece has a head")
    head = attempt.heads[0]
    require(head.status == status, f"the head says status {head.status}; the engine answered {status}")
    require(
        head.content_type.lower().replace(" ", "").startswith(content_type.replace(" ", "")),
        f"the head says content type {head.content_type}; the engine answered {content_type}",
    )
    require(not attempt.has_gap, f"pieces are missing: only {sorted(attempt.pieces)[:20]} came")
    require(attempt.output == expected, _difference(attempt.output, expected))


def check_released(attempt: Attempt, kind: str) -> None:
    """The attempt was released once, in this way."""
    require(not attempt.settles, "the attempt was settled, although there is no whole answer")
    require(len(attempt.releases) == 1, f"the attempt was released {len(attempt.releases)} times")
    found = attempt.releases[0].kind
    require(found == kind, f"the attempt was released as {found}, not {kind}")


def _reason(attempt: Attempt) -> str:
    return attempt.releases[0].reason if attempt.releases else "it has not ended"


def _difference(found: bytes, expected: bytes) -> str:
    same = next((n for n, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other), None)
    if same is None:
        return f"the answer has {len(found)} bytes instead of {len(expected)}"
    return f"the answer differs at byte {same}: {found[same : same + 40]!r} instead of {expected[same : same + 40]!r}"

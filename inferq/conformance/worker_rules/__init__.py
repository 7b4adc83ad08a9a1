"""The rules of the worker protocol that a worker is checked by, in the order in which they are checked."""

from __future__ import annotations

from ..scorecard import Rule
from ..worker_kit import WorkerKit
from .answers import ANSWER_RULES
from .claims import CLAIM_RULES
from .endings import ENDING_RULES
from .failures import FAILURE_RULES
from .sessions import SESSION_RULES

WORKER_RULES: tuple[Rule[WorkerKit], ...] = (
    *SESSION_RULES,
    *CLAIM_RULES,
    *ANSWER_RULES,
    *FAILURE_RULES,
    *ENDING_RULES,
)

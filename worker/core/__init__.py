"""The worker's decisions, pure: no await, clock, randomness, environment or I/O."""

from .continuation import Continuation
from .frames import FrameCutter
from .liveness import Liveness
from .slots import Claim, Slots
from .verdict import Retry, judge_answer, judge_failure

__all__ = ["Claim", "Continuation", "FrameCutter", "Liveness", "Retry", "Slots", "judge_answer", "judge_failure"]

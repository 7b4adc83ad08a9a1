"""The worker's decisions, pure: no await, clock, randomness, environment or I/O."""

from .frames import FrameCutter
from .liveness import Liveness
from .slots import Claim, Slots
from .verdict import Retry, judge_answer, judge_failure

__all__ = ["Claim", "FrameCutter", "Liveness", "Retry", "Slots", "judge_answer", "judge_failure"]

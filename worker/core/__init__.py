"""The worker's decisions, pure: no await, clock, randomness, environment or I/O."""

from .continuation import Continuation
from .engine_progress import EngineProgress
from .fallback import FallbackWatch
from .frames import FrameCutter
from .loop_watchdog import LATE_S, LoopWatchdog
from .slots import Claim, Slots
from .stream_stall import StreamStall, may_buffer
from .verdict import Retry, RetryLater, judge_answer, judge_failure, judge_server_error
from .wholeness import is_readable, is_whole

__all__ = [
    "LATE_S",
    "Claim",
    "Continuation",
    "EngineProgress",
    "FallbackWatch",
    "FrameCutter",
    "LoopWatchdog",
    "Retry",
    "RetryLater",
    "Slots",
    "StreamStall",
    "is_readable",
    "is_whole",
    "judge_answer",
    "judge_failure",
    "judge_server_error",
    "may_buffer",
]

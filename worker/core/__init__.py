"""The worker's decisions, pure: no await, clock, randomness, environment or I/O."""

from .completeness import is_complete, is_readable
from .continuation import Continuation
from .engine_load import read_load
from .engine_progress import EngineProgress
from .fallback import FallbackWatch
from .frames import FrameCutter
from .loop_watchdog import LATE_S, LoopWatchdog
from .slots import Claim, Slots
from .stream_stall import StreamStall, may_buffer
from .usage import AnswerUsage, read_usage
from .verdict import Retry, RetryLater, judge_answer, judge_failure, judge_server_error

__all__ = [
    "LATE_S",
    "AnswerUsage",
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
    "is_complete",
    "is_readable",
    "judge_answer",
    "judge_failure",
    "judge_server_error",
    "may_buffer",
    "read_load",
    "read_usage",
]

"""The Manager's decisions, pure: ``now`` (monotonic seconds) comes as an argument, effects go back to the caller."""

from .assignment import next_assignment, wanted_pools
from .liveness import Evidence, Liveness, ProbeResult, ProbeStatus, assess_liveness
from .registry import Member, Registry

__all__ = [
    "Evidence",
    "Liveness",
    "Member",
    "ProbeResult",
    "ProbeStatus",
    "Registry",
    "assess_liveness",
    "next_assignment",
    "wanted_pools",
]

"""The Manager's decisions, pure: ``now`` (monotonic seconds) comes as an argument, effects go back to the caller."""

from .assignment import next_assignment, wanted_pools
from .liveness import Door, DoorState, Evidence, Verdict, judge
from .registry import Member, Registry

__all__ = [
    "Door",
    "DoorState",
    "Evidence",
    "Member",
    "Registry",
    "Verdict",
    "judge",
    "next_assignment",
    "wanted_pools",
]

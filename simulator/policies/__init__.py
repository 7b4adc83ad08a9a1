"""What decides which request runs where: inferq's queue, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .inferq import PullQueue, QueueRules
from .port import Policy, PolicyContext
from .push import BoundedHashing, LeastLoaded, RoundRobin

__all__ = ["POLICIES", "Policy", "PolicyContext", "PolicyKind", "QueueRules"]


@dataclass(frozen=True, slots=True)
class PolicyKind:
    """How a policy is made. ``has_slots``: a worker runs no more than its slots; else an engine gets as much as it runs
    at once, and more where the policy pushes. ``shared_cache``: all engines have one endless prefix cache, which no
    real fleet has."""

    make: Callable[[PolicyContext, QueueRules], Policy]
    has_slots: bool = False
    shared_cache: bool = False


POLICIES: Mapping[str, PolicyKind] = {
    "inferq": PolicyKind(PullQueue, has_slots=True),
    "round-robin": PolicyKind(lambda context, _: RoundRobin(context)),
    "least-loaded": PolicyKind(lambda context, _: LeastLoaded(context)),
    "bounded-hashing": PolicyKind(lambda context, _: BoundedHashing(context)),
    "oracle": PolicyKind(
        lambda context, rules: PullQueue(context, QueueRules(affinity=False, packs=rules.packs)), shared_cache=True
    ),
}
"""By the name that the command line takes."""

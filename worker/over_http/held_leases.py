"""What the calls of one worker have in common: its session, and the leases that it was given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from queue_schemas import JobId, Lease, SessionId
from queue_schemas.worker_protocol.jobs import LeasedJob, lease_of

_MAX_REMEMBERED = 4_096


class HeldLeases:
    """``session_id`` is that of the last join. Leases of an earlier one are worth nothing, as its calls are fenced."""

    def __init__(self) -> None:
        self.session_id = SessionId("")
        self._persisted: OrderedDict[JobId, str] = OrderedDict()

    def take(self, given: LeasedJob) -> Lease:
        """A lease that the Router gave."""
        lease = lease_of(given)
        if lease.job.persisted:
            self._persisted[lease.job.id] = given.lease
            if len(self._persisted) > _MAX_REMEMBERED:
                self._persisted.popitem(last=False)
        return lease

    def token_of(self, job_id: JobId) -> str:
        """The lease of a persisted job; empty if it is not known any more, which no Router takes."""
        return self._persisted.get(job_id, "")


def tokens_of(leases: Sequence[Lease]) -> list[str]:
    """The leases as the Router gave them."""
    return [lease.job.reply_to for lease in leases]

"""Build every Redis key, for the broker and its tests.

All keys of a shard carry its number as hash tag, so they share one Redis Cluster slot and a script may touch any of
them. The scripts build the same names from :meth:`ShardKeys.prefix`; the contract tests compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import BadMessage
from .ids import encode_name, shard_of_job
from .lanes import Lane

NAMESPACE = "iq"
META = "iq:meta"
"""Hash: the constants of the deployment (``shards``, ``contract``), checked at every start."""
WORKERS = "iq:workers"
"""Hash: worker id -> JSON of the registry's entry, written by the acting Manager."""
ADAPTERS = "iq:adapters"
"""Hash: name of a set of LoRA adapters -> JSON list of their names, written by the acting Manager."""
POOLS = "iq:pools"
"""Hash: ``seen:<model>``, ``declared:<model>`` and ``scaled:<model>`` -> when a pool was last served, last declared and
last claimed by an autoscaler (queue ms)."""
MANAGER = "iq:manager"
"""Hash: the acting Manager's lease (``holder``, ``term``, ``until`` by the lease's own ``clock``)."""
SWEEPER = "iq:sweeper"
"""Hash: the same for the one worker that sweeps while no Manager acts."""
LEASE_SECRET = "iq:lease_secret"  # noqa: S105 - the name of a key
"""String: what Routers sign the leases with that they give to workers over HTTP."""


def autoscaler_key(pool: str) -> str:
    """Hash: the same for the one autoscaler that acts for a pool. Expires."""
    return f"{NAMESPACE}:autoscaler:{encode_name(pool)}"


def queue_key(pool: str, lane: Lane, region: str = "") -> str:
    """Where a job waits, as it stands inside keys: ``<pool>:<lane>``, or ``<pool>:<lane>@<region>`` if workers of that
    region go first."""
    at = f"@{encode_name(region)}" if region else ""
    return f"{encode_name(pool)}:{lane}{at}"


@dataclass(frozen=True, slots=True)
class ShardKeys:
    """The keys of shard ``shard``."""

    shard: int

    @property
    def prefix(self) -> str:
        return f"{NAMESPACE}:{{{self.shard}}}:"

    def queue(self, pool: str, lane: Lane, band: int, tenant: str, region: str = "") -> str:
        """Stream of waiting jobs, entries ``id <job id>``. XLEN is the depth. Deleted when empty."""
        return f"{self.prefix}q:{queue_key(pool, lane, region)}:{band}:{encode_name(tenant)}"

    def retry(self, pool: str, lane: Lane) -> str:
        """Stream of jobs whose attempt was lost or handed back."""
        return f"{self.prefix}retry:{encode_name(pool)}:{lane}"

    def suspects(self, pool: str, lane: Lane) -> str:
        """Stream of jobs during which an engine crashed; a worker holds at most one of them."""
        return f"{self.prefix}suspects:{encode_name(pool)}:{lane}"

    def active(self, pool: str, lane: Lane, band: int, region: str = "") -> str:
        """Sorted set: tenants with waiting jobs by virtual service time."""
        return f"{self.prefix}active:{queue_key(pool, lane, region)}:{band}"

    def service(self, pool: str, lane: Lane, band: int, region: str = "") -> str:
        """Sorted set: tenant -> virtual time at which its last job ended; member ``*`` is the band's clock. Expires."""
        return f"{self.prefix}service:{queue_key(pool, lane, region)}:{band}"

    def job(self, job_id: str) -> str:
        """Hash: the record. Once terminal, and unless its output is persisted, a string: a tombstone with expiry."""
        return f"{self.prefix}job:{job_id}"

    def leases(self, session_id: str) -> str:
        """Hash: job id -> epoch, the jobs leased to one worker session."""
        return f"{self.prefix}leases:{session_id}"

    def claimed(self, session_id: str) -> str:
        """Hash: the last claim of a session and its answer, for a repeated call; where it is parked."""
        return f"{self.prefix}claimed:{session_id}"

    @property
    def renewals(self) -> str:
        """Hash: session id -> renewal counter. A session that has none, or a negative one (it is being reclaimed), is
        fenced."""
        return f"{self.prefix}renewals"

    def control(self, session_id: str) -> str:
        """Stream: jobs handed to one worker; wakes, aborts, drains and pings for it."""
        return f"{self.prefix}ctl:{session_id}"

    def parked(self, pool: str, lane: Lane, region: str = "") -> str:
        """Sorted set: idle sessions, all or those of one region, by expiry (queue ms)."""
        return f"{self.prefix}parked:{queue_key(pool, lane, region)}"

    def offers(self, pool: str, lane: Lane, region: str = "") -> str:
        """Sorted set: parked sessions that are handed jobs there, the most free first (minus their free slots)."""
        return f"{self.prefix}offers:{queue_key(pool, lane, region)}"

    def yieldable(self, pool: str, region: str = "") -> str:
        """Sorted set: running jobs of a pool, all or those at workers of one region, whose attempt may yield, by its
        start, or minus the time at which it was asked to (queue ms)."""
        at = f"@{encode_name(region)}" if region else ""
        return f"{self.prefix}yieldable:{encode_name(pool)}{at}"

    @property
    def warm(self) -> str:
        """Hash with at most 2^18 fields: who was leased jobs with a prefix lately (:mod:`scheduling.affinity`)."""
        return f"{self.prefix}warm"

    @property
    def deadlines(self) -> str:
        """Sorted set: live job ids by deadline (queue ms)."""
        return f"{self.prefix}deadlines"

    @property
    def heads(self) -> str:
        """Hash: queue key -> ``<ms> <ms>``: how long the longest-waiting job has waited there, and until the earliest
        deadline (``-``: unknown), as the sweep found it."""
        return f"{self.prefix}heads"

    @property
    def lost(self) -> str:
        """Sorted set: streams that wait for their Router, by when it is asked again (queue ms)."""
        return f"{self.prefix}lost"

    def reply(self, router: str) -> str:
        """Stream: frames and markers for one session of one Router, which alone creates it and keeps it alive."""
        return f"{self.prefix}reply:{router}"

    def out(self, job_id: str) -> str:
        """Stream: a persisted job's output, one packed frame an entry, ids ``epoch-seq``. Expires."""
        return f"{self.prefix}out:{job_id}"

    def listeners(self, job_id: str) -> str:
        """Set: Routers that a persisted job's new frames are sent to. Expires."""
        return f"{self.prefix}listeners:{job_id}"

    def idempotency(self, digest: str) -> str:
        """String: ``<job id> <digest of its request>``, by the digest of tenant, model and idempotency key. Expires."""
        return f"{self.prefix}idem:{digest}"

    def listed(self, tenant: str) -> str:
        """Sorted set, all scores 0: a tenant's background jobs, as ``<created ms, 15 digits> <job id>``. Expires."""
        return f"{self.prefix}listed:{encode_name(tenant)}"

    @property
    def finished(self) -> str:
        """Stream: notices of finished jobs that have a ``topic``; at most 100,000."""
        return f"{self.prefix}finished"

    @property
    def finished_dropped(self) -> str:
        """Hash: ``dropped``, how many notices were dropped unread."""
        return f"{self.prefix}finished_dropped"

    @property
    def persisted(self) -> str:
        """Sorted set: persisted jobs that finished, by when they are deleted (queue ms)."""
        return f"{self.prefix}persisted"

    @property
    def dead(self) -> str:
        """Stream: dead letters with their cause."""
        return f"{self.prefix}dead"

    def dead_request(self, entry_id: str) -> str:
        """String: the request of the dead letter ``entry_id``."""
        return f"{self.prefix}dead_request:{entry_id}"

    @property
    def clock(self) -> str:
        """String: ``<server ms> <queue ms>``, the server's clock and the queue's own when that was last written. Every
        time that the scripts keep is one of the queue's clock, which steps of the server's do not move."""
        return f"{self.prefix}clock"

    @property
    def readers(self) -> str:
        """Sorted set: the owners of reply streams, by when those are removed unless they are kept alive."""
        return f"{self.prefix}readers"

    @property
    def synced(self) -> str:
        """String, empty: written before the disk is asked to confirm what was written before."""
        return f"{self.prefix}synced"

    @property
    def budget(self) -> str:
        """Hash: live jobs and bytes per tenant (``t:<tenant>:jobs``) and pool (``p:<pool>:jobs``), and the bytes of
        a tenant's persisted jobs (``t:<tenant>:persisted``)."""
        return f"{self.prefix}budget"

    @property
    def counters(self) -> str:
        """Hash: ``<queue key>:waiting``, ``<queue key>:turn`` (jobs claimed there since nothing waited last, which
        decides the next one's band order), ``<queue key>:wait`` (the longest wait of late, ms; since a job with
        digests waited, until nothing waits) and ``<pool>:<lane>:leased``; and since ever ``<pool>:<lane>:enqueued`` and
        one counter per terminal state and per requeue, for what was cancelled or expired also by what it was doing
        (``expired/running``), and one per outcome of affinity (``affinity/warm``)."""
        return f"{self.prefix}counters"

    @property
    def arrivals(self) -> str:
        """Hash: ``<pool>:<lane>`` -> ``<jobs> <thousandths>``: how many had come, and what counts of those of late
        (:mod:`scheduling.arrivals`), as the sweep found them ``at`` (queue ms)."""
        return f"{self.prefix}arrivals"


def keys_of_job(keys: Sequence[ShardKeys], job_id: str) -> ShardKeys:
    """The keys of the shard that holds ``job_id``, out of ``keys`` of all shards.

    Raises ``BadMessage`` for what is no job id, and for an id that names a shard that does not exist.
    """
    shard = shard_of_job(job_id)
    if shard >= len(keys):
        raise BadMessage(f"no job of this queue: {job_id}; it has {len(keys)} shards")
    return keys[shard]

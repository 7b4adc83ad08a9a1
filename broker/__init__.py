"""All Redis access, for every role: ``Broker`` with the queue's operations, its settings and its result types."""

from .client import Broker
from .operations.attempts import Attempts, Undelivered
from .operations.dead_letters import MAX_DEAD_LETTERS, DeadLetters
from .operations.durable_replies import ReplyMessage
from .operations.jobs import JobStatus
from .operations.known_pools import RememberedPools
from .operations.maintenance import Expired, Reclaimed
from .operations.persisted_jobs import MAX_PAGE_JOBS
from .operations.signed_leases import SignedLeases
from .operations.stats import JobCounts
from .operations.workers import Workers
from .redis.server_checks import ServerFacts
from .renewal import Renewer
from .settings import BrokerSettings, Budgets, Durability

__all__ = [
    "MAX_DEAD_LETTERS",
    "MAX_PAGE_JOBS",
    "Attempts",
    "Broker",
    "BrokerSettings",
    "Budgets",
    "DeadLetters",
    "Durability",
    "Expired",
    "JobCounts",
    "JobStatus",
    "Reclaimed",
    "RememberedPools",
    "Renewer",
    "ReplyMessage",
    "ServerFacts",
    "SignedLeases",
    "Undelivered",
    "Workers",
]

"""All Redis access: one client, atomic scripts, the queue operations."""

from .client import Broker
from .operations.dead_letters import MAX_LETTERS, DeadLetters
from .operations.durable_replies import ReplyMessage
from .operations.jobs import JobStatus
from .operations.maintenance import Expired, Reclaimed
from .operations.persisted_jobs import MAX_LISTED
from .operations.renewal import Renewer
from .operations.stats import JobCounts
from .redis.server_checks import ServerFacts
from .settings import BrokerSettings, Budgets, Durability

__all__ = [
    "MAX_LETTERS",
    "MAX_LISTED",
    "Broker",
    "BrokerSettings",
    "Budgets",
    "DeadLetters",
    "Durability",
    "Expired",
    "JobCounts",
    "JobStatus",
    "Reclaimed",
    "Renewer",
    "ReplyMessage",
    "ServerFacts",
]

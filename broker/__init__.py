"""All Redis access: one client, atomic scripts, the queue operations."""

from .client import Broker, Standing
from .dead_letters import MAX_LETTERS, DeadLetters
from .durable_replies import ReplyMessage
from .persisted_jobs import MAX_LISTED
from .redis.server_checks import ServerFacts
from .renewal import Renewer
from .settings import BrokerSettings, Budgets, Durability
from .stats import JobCounts
from .upkeep import Expired, Reclaimed

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
    "Reclaimed",
    "Renewer",
    "ReplyMessage",
    "ServerFacts",
    "Standing",
]

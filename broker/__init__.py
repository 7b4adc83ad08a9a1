"""All Redis access: one client, atomic scripts, the queue operations."""

from .client import Broker, Standing
from .dead_letters import MOST_LETTERS, DeadLetters
from .durable_replies import Letter
from .persisted_jobs import MOST_LISTED
from .redis.server_checks import ServerFacts
from .renewal import Renewer
from .settings import BrokerSettings, Budgets, Durability
from .stats import JobCounts
from .upkeep import Expired, Reclaimed

__all__ = [
    "MOST_LETTERS",
    "MOST_LISTED",
    "Broker",
    "BrokerSettings",
    "Budgets",
    "DeadLetters",
    "Durability",
    "Expired",
    "JobCounts",
    "Letter",
    "Reclaimed",
    "Renewer",
    "ServerFacts",
    "Standing",
]

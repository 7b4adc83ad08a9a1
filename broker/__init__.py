"""All Redis access: one client, atomic scripts, the queue operations."""

from .client import Broker, Standing
from .dead_letters import MOST_LETTERS, DeadLetters
from .figures import JobCounts
from .kept_jobs import MOST_LISTED
from .mailboxes import Letter
from .renewal import Renewer
from .server import ServerFacts
from .settings import BrokerSettings, Budgets, Durability
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

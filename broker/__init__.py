"""All Redis access: one client, atomic scripts, the queue operations."""

from .client import Broker, Expired, Reclaimed
from .server import ServerFacts
from .settings import BrokerSettings, Budgets

__all__ = ["Broker", "BrokerSettings", "Budgets", "Expired", "Reclaimed", "ServerFacts"]

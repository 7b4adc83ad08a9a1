"""The Manager: knows the fleet, assigns queues to workers, notices who has died. It never touches a request.

Its process, which ``python -m`` runs, is :mod:`manager.service`.
"""

from .http import create_app
from .office import ManagerService
from .ports import QueuePort, WorkerProbe
from .settings import ManagerSettings

__all__ = ["ManagerService", "ManagerSettings", "QueuePort", "WorkerProbe", "create_app"]

"""The Manager: keeps the registry of workers, assigns queues to them, detects dead ones. No request passes it.

Its process, which ``python -m`` runs, is :mod:`manager.service`.
"""

from .control_plane import ManagerService
from .ports import QueuePort, WorkerProbe
from .routes import create_app
from .settings import ManagerSettings

__all__ = ["ManagerService", "ManagerSettings", "QueuePort", "WorkerProbe", "create_app"]

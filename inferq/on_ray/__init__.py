"""The Ray topology: a cluster, in it the Manager as an actor and the Router as a Serve application.

Importing this loads no Ray: a process must set Ray's variables before it imports it (:mod:`.cluster`).
"""

from .settings import RaySettings

__all__ = ["RaySettings"]

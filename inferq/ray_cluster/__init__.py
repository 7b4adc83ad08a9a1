"""A Ray cluster: of our own or joined, the processes and actors that we have in it, workers among them.

Importing this loads no Ray: a process must set Ray's variables before it imports it (:mod:`.cluster`).
"""

from .settings import RaySettings

__all__ = ["RaySettings"]

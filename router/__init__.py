"""The Router: an OpenAI-compatible endpoint in front of the queue."""

from .app import RouterApp, build_router
from .settings import RouterSettings

__all__ = ["RouterApp", "RouterSettings", "build_router"]

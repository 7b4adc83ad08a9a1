"""`inferq doctor`: check an installation, and say how to fix what is wrong."""

from .examine import examine
from .findings import Examined, Finding, Level

__all__ = ["Examined", "Finding", "Level", "examine"]

"""Looks at what the fabric needs, and says how to mend what it finds."""

from .examine import examine
from .findings import Examined, Finding, Level

__all__ = ["Examined", "Finding", "Level", "examine"]

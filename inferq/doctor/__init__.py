"""`inferq doctor`: check an installation, and say how to fix what is wrong."""

from .examine import examine
from .findings import DoctorTarget, Finding, Level

__all__ = ["DoctorTarget", "Finding", "Level", "examine"]

"""Webhooks: what ended is told to who wants to know, signed, as often as it takes within a day."""

from __future__ import annotations

from .courier import Courier
from .sender import Answer, Sender
from .settings import NotifierSettings

__all__ = ["Answer", "Courier", "NotifierSettings", "Sender"]

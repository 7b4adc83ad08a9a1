"""Workers that reach nothing but a Router: no Redis, no Manager, no port of their own."""

from __future__ import annotations

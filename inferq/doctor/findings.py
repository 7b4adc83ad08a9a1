"""The findings of the checks, and what they examine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from inferq.fleet.client import FleetClient

ASK_LIMIT_S = 3.0
"""Limit on one HTTP answer."""


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; ``fix`` says what to do about it, and is empty when all is well."""

    check: str
    level: Level
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class DoctorTarget:
    """What the checks examine."""

    redis_url: str
    client: FleetClient
    data_dir: Path
    engine_url: str = ""
    router_named: bool = False
    """Whether the user named the Router's URL: then it must answer."""

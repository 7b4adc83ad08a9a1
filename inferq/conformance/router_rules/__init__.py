"""The rules of the worker protocol that a Router is checked by: what it does, and what no worker can do."""

from __future__ import annotations

from ..router_kit import RouterKit
from ..scorecard import Rule
from .jobs import JOB_RULES
from .lies import LIE_RULES

ROUTER_RULES: tuple[Rule[RouterKit], ...] = (*JOB_RULES, *LIE_RULES)

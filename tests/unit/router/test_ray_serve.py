"""The Router as a Serve application: which settings are Serve's to decide."""

from __future__ import annotations

import pytest

from broker import BrokerSettings
from queue_schemas import CannotStart
from router import RouterSettings
from router.ray_serve import application
from storage import StorageSettings
from telemetry import TelemetrySettings
from webhooks.settings import WebhookSettings


def test_serve_decides_how_many_processes_run() -> None:
    """Several processes within a replica are refused, with the settings that say the same to Serve."""
    settings = RouterSettings(processes=2)
    with pytest.raises(CannotStart, match="INFERQ_ROUTER_PROCESSES at 1 and set min_replicas and max_replicas"):
        application(settings, BrokerSettings(), StorageSettings(), WebhookSettings(), TelemetrySettings())

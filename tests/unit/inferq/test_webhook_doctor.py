"""The doctor looks whether somebody sends webhooks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from inferq.client import RequestFailed
from inferq.doctor import DoctorTarget, Level
from inferq.doctor.webhooks import check_webhooks
from inferq.fleet.client import FleetClient
from openai_api.pages import page_of

ENDPOINT = {"id": "we_1", "url": "https://x.example", "event_types": ["*"], "created_at": 1, "status": "disabled"}


class Router(FleetClient):
    """Has one endpoint, and what is told of its deliveries."""

    def __init__(self, *deliveries: dict[str, Any], refused: int = 0) -> None:
        super().__init__("http://127.0.0.1:1")
        self.deliveries, self.refused = deliveries, refused

    async def health(self) -> bool:
        return True

    async def call(self, method: str, path: str, **_: Any) -> bytes:  # type: ignore[override]
        if self.refused:
            raise RequestFailed("as ordered", http_status=self.refused)
        return json.dumps(
            page_of(list(self.deliveries) if "deliveries" in path else [ENDPOINT], has_more=False)
        ).encode()


def delivery(age_s: float, **fields: Any) -> dict[str, Any]:
    plain = {"id": "evt_1", "event_type": "batch.failed", "data": {"id": "batch_1"}, "status": "pending"}
    return plain | {"created_at": int(time.time() - age_s), "attempts": []} | fields


async def test_the_doctor_misses_a_notifier(tmp_path: Path) -> None:
    """When an event has waited for a minute without an attempt, and not before, nor for what is tried again."""
    attempt = {"at": 1, "status_code": 500}
    for router, level in (
        (Router(delivery(300)), Level.WARNING),
        (Router(delivery(5)), Level.OK),
        (Router(delivery(300, attempts=[attempt])), Level.OK),
        (Router(delivery(300, status="delivered")), Level.OK),
        (Router(refused=503), Level.FAILURE),
    ):
        (finding,) = await check_webhooks(DoctorTarget("", router, tmp_path))
        assert finding.level is level, finding
    assert await check_webhooks(DoctorTarget("", Router(refused=404), tmp_path)) == []

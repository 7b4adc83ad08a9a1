"""Webhook endpoints and their deliveries through a Router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aiohttp
from pydantic import BaseModel, ConfigDict

from ..client import RouterClient, parse, path_part

ENDPOINTS_PATH = "/v1/webhook_endpoints"
_TEST_LIMIT_S = 30.0
"""Longer than a Router waits for the answer of the endpoint."""


class EndpointView(BaseModel):
    """An endpoint as the Router shows it; ``signing_secret`` only in the answer that creates the secret."""

    model_config = ConfigDict(extra="allow")

    id: str
    url: str
    event_types: list[str]
    name: str = ""
    status: str = ""
    disabled_reason: str | None = None
    created_at: int
    signing_secret: str = ""


class AttemptView(BaseModel):
    """One attempt to deliver an event: when, the receiver's status, and how long it took."""

    at: int
    status_code: int | None = None
    duration_ms: int = 0
    error: str | None = None


class DeliveryView(BaseModel):
    """The delivery of one event."""

    model_config = ConfigDict(extra="allow")

    id: str
    event_type: str
    created_at: int
    data: dict[str, Any]
    status: str
    next_attempt_at: int | None = None
    attempts: list[AttemptView] = []


class _Tested(BaseModel):
    status_code: int


class WebhookClient(RouterClient):
    """All methods raise :class:`RequestFailed`."""

    async def add(self, url: str, events: Sequence[str], name: str) -> EndpointView:
        body = {"url": url, "event_types": list(events), "name": name}
        return parse(EndpointView, await self.send_json(ENDPOINTS_PATH, body))

    async def endpoints(self) -> list[EndpointView]:
        """All endpoints, newest first."""
        return await self.get_all(ENDPOINTS_PATH, EndpointView)

    async def endpoint(self, endpoint_id: str) -> EndpointView:
        return parse(EndpointView, await self.call("GET", _path(endpoint_id)))

    async def change(self, endpoint_id: str, **fields: object) -> EndpointView:
        return parse(EndpointView, await self.send_json(_path(endpoint_id), fields))

    async def remove(self, endpoint_id: str) -> None:
        await self.call("DELETE", _path(endpoint_id))

    async def rotate(self, endpoint_id: str, keep_s: int) -> EndpointView:
        """Replace the signing secret; the old one stays valid for ``keep_s`` seconds."""
        path = f"{_path(endpoint_id)}/rotate_secret"
        return parse(EndpointView, await self.send_json(path, {"keep_old_secret_s": keep_s}))

    async def test(self, endpoint_id: str, event_type: str) -> int:
        """Send a sample event; the status of the endpoint's answer."""
        limit = aiohttp.ClientTimeout(total=_TEST_LIMIT_S)
        answer = await self.send_json(f"{_path(endpoint_id)}/test", {"event_type": event_type}, timeout=limit)
        return parse(_Tested, answer).status_code

    async def deliveries(self, endpoint_id: str, limit: int) -> list[DeliveryView]:
        """The newest ``limit`` deliveries."""
        return await self.get_all(f"{_path(endpoint_id)}/deliveries", DeliveryView, limit)


def _path(endpoint_id: str) -> str:
    return f"{ENDPOINTS_PATH}/{path_part(endpoint_id, 'an endpoint', 'inferq webhooks list')}"

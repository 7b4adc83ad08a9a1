"""Webhook endpoints as the commands ask a Router for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aiohttp
import orjson
from pydantic import BaseModel, ConfigDict

from ..client import FabricClient, FabricRefused

ENDPOINTS_PATH = "/v1/webhook_endpoints"
_PAGE = 100
_TEST_LIMIT_S = 30.0
"""Longer than a Router waits for the endpoint's answer."""


class EndpointView(BaseModel):
    """An endpoint as the Router shows it; ``signing_secret`` only where it is shown."""

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
    at: int
    status_code: int | None = None
    duration_ms: int = 0
    error: str | None = None


class DeliveryView(BaseModel):
    """What became of an event."""

    model_config = ConfigDict(extra="allow")

    id: str
    event_type: str
    created_at: int
    data: dict[str, Any]
    status: str
    next_attempt_at: int | None = None
    attempts: list[AttemptView] = []


class EndpointPage(BaseModel):
    data: list[EndpointView]
    has_more: bool = False


class DeliveryPage(BaseModel):
    data: list[DeliveryView]
    has_more: bool = False


class _Tested(BaseModel):
    status_code: int


class WebhookClient(FabricClient):
    """All methods raise :class:`FabricRefused`."""

    async def add(self, url: str, events: Sequence[str], name: str) -> EndpointView:
        asked = {"url": url, "event_types": list(events), "name": name}
        return self.parsed(EndpointView, await self._send_json("", asked))

    async def endpoints(self) -> list[EndpointView]:
        """All of them, newest first."""
        found: list[EndpointView] = []
        while True:
            after = f"&after={found[-1].id}" if found else ""
            page = self.parsed(EndpointPage, await self.call("GET", f"{ENDPOINTS_PATH}?limit={_PAGE}{after}"))
            found += page.data
            if not page.has_more or not page.data:
                return found

    async def endpoint(self, endpoint_id: str) -> EndpointView:
        return self.parsed(EndpointView, await self.call("GET", ENDPOINTS_PATH + _named(endpoint_id)))

    async def change(self, endpoint_id: str, **fields: object) -> EndpointView:
        return self.parsed(EndpointView, await self._send_json(_named(endpoint_id), fields))

    async def remove(self, endpoint_id: str) -> None:
        await self.call("DELETE", ENDPOINTS_PATH + _named(endpoint_id))

    async def rotate(self, endpoint_id: str, keep_s: int) -> EndpointView:
        path = f"{_named(endpoint_id)}/rotate_secret"
        return self.parsed(EndpointView, await self._send_json(path, {"keep_old_secret_s": keep_s}))

    async def test(self, endpoint_id: str, event_type: str) -> int:
        """The status with which it answered a sample."""
        limit = aiohttp.ClientTimeout(total=_TEST_LIMIT_S)
        path = f"{_named(endpoint_id)}/test"
        return self.parsed(_Tested, await self._send_json(path, {"event_type": event_type}, timeout=limit)).status_code

    async def deliveries(self, endpoint_id: str, limit: int) -> list[DeliveryView]:
        """The newest so many."""
        found: list[DeliveryView] = []
        while len(found) < limit:
            after = f"&after={found[-1].id}" if found else ""
            query = f"?limit={min(_PAGE, limit - len(found))}{after}"
            path = f"{ENDPOINTS_PATH}{_named(endpoint_id)}/deliveries{query}"
            page = self.parsed(DeliveryPage, await self.call("GET", path))
            found += page.data
            if not page.has_more or not page.data:
                break
        return found

    async def _send_json(self, path: str, body: object, **options: Any) -> bytes:
        headers = {"content-type": "application/json"}
        return await self.call("POST", ENDPOINTS_PATH + path, data=orjson.dumps(body), headers=headers, **options)


def _named(endpoint_id: str) -> str:
    """Only what can be an id becomes part of a path."""
    if not endpoint_id.replace("_", "").isalnum() or not endpoint_id.isascii():
        raise FabricRefused(
            f"{endpoint_id!r} is not the id of an endpoint: `inferq webhooks list` shows them", answered=404
        )
    return f"/{endpoint_id}"

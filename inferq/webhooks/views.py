"""``inferq webhooks``: create and change endpoints, and print their deliveries."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from inferq.console import err, out, print_json, visible
from inferq.tables import Column, Row, print_table
from inferq.webhooks.client import DeliveryView, EndpointView, WebhookClient

_SHOWN_ONCE = "The signing secret, with which receivers verify signatures, is shown only now:"


async def add_endpoint(client: WebhookClient, url: str, events: Sequence[str], name: str, *, as_json: bool) -> int:
    """Create an endpoint and print its secret."""
    async with client:
        made = await client.add(url, events, name)
    _print_secret(made, f"{made.id} receives {', '.join(made.event_types)}", as_json=as_json)
    return 0


async def list_endpoints(client: WebhookClient, *, as_json: bool) -> int:
    """Print all endpoints; return the exit code."""
    async with client:
        found = await client.endpoints()
    if as_json:
        print_json([one.model_dump(exclude={"signing_secret"}) for one in found])
    elif found:
        print_table(_ENDPOINT_COLUMNS, [_endpoint_row(one) for one in found])
    else:
        out.print("No webhook endpoints. Create one with: inferq webhooks add URL")
    return 0


async def show_endpoint(client: WebhookClient, endpoint_id: str, *, as_json: bool) -> int:
    """Print one endpoint; return the exit code."""
    async with client:
        found = await client.endpoint(endpoint_id)
    _show(found, as_json=as_json)
    return 0


async def remove_endpoint(client: WebhookClient, endpoint_id: str, *, as_json: bool) -> int:
    """Remove an endpoint; return the exit code."""
    async with client:
        await client.remove(endpoint_id)
    if as_json:
        print_json({"id": endpoint_id, "removed": True})
    else:
        out.print(visible(f"{endpoint_id} is removed"), markup=False, emoji=False)
    return 0


async def rotate_secret(client: WebhookClient, endpoint_id: str, keep_s: int, *, as_json: bool) -> int:
    """Replace the secret and print the new one."""
    async with client:
        rotated = await client.rotate(endpoint_id, keep_s)
    kept = f"the old secret stays valid for {keep_s} s" if keep_s else "the old secret is no longer valid"
    _print_secret(rotated, f"{rotated.id}: {kept}", as_json=as_json)
    return 0


async def set_enabled(client: WebhookClient, endpoint_id: str, *, enabled: bool, as_json: bool) -> int:
    """Enable or disable an endpoint; return the exit code."""
    async with client:
        found = await client.change(endpoint_id, enabled=enabled)
    _show(found, as_json=as_json)
    return 0


async def test_endpoint(client: WebhookClient, endpoint_id: str, event_type: str, *, as_json: bool) -> int:
    """Send a sample event; exit code 1 unless the endpoint answers with success."""
    async with client:
        status = await client.test(endpoint_id, event_type)
    if as_json:
        print_json({"id": endpoint_id, "event_type": event_type, "status_code": status})
    else:
        out.print(f"answered with HTTP {status}")
    return 0 if 200 <= status < 300 else 1


async def list_deliveries(client: WebhookClient, endpoint_id: str, limit: int, *, as_json: bool) -> int:
    """Print the latest deliveries of an endpoint; return the exit code."""
    async with client:
        found = await client.deliveries(endpoint_id, limit)
    if as_json:
        print_json([one.model_dump() for one in found])
    elif found:
        print_table(_DELIVERY_COLUMNS, [_delivery_row(one) for one in found])
    else:
        out.print("No deliveries: nothing was sent, or the log was trimmed.")
    return 0


def _print_secret(endpoint: EndpointView, what: str, *, as_json: bool) -> None:
    if as_json:
        print_json(endpoint.model_dump())
        return
    err.print(visible(f"{what}. {_SHOWN_ONCE}"), markup=False, emoji=False)
    sys.stdout.write(f"{endpoint.signing_secret}\n")


def _show(endpoint: EndpointView, *, as_json: bool) -> None:
    if as_json:
        print_json(endpoint.model_dump(exclude={"signing_secret"}))
        return
    for name, value in endpoint.model_dump(exclude={"signing_secret"}).items():
        if value not in (None, ""):
            shown = ", ".join(value) if isinstance(value, list) else value
            out.print(visible(f"{name}: {shown}"), markup=False, emoji=False)


_ENDPOINT_COLUMNS = (
    Column("ID"),
    Column("STATUS", 1, shrinks=True),
    Column("EVENTS", 4, shrinks=True),
    Column("NAME", 3, shrinks=True),
    Column("URL", 2, shrinks=True),
)
_DELIVERY_COLUMNS = (
    Column("EVENT"),
    Column("TYPE", 2),
    Column("OF", 4),
    Column("STATUS", 1),
    Column("ATTEMPTS", 6, right=True),
    Column("LAST ANSWER", 3, shrinks=True),
    Column("NEXT", 5),
)


def _endpoint_row(one: EndpointView) -> Row:
    status = f"{one.status}: {one.disabled_reason}" if one.disabled_reason else one.status
    return Row((one.id, status, ", ".join(one.event_types), one.name, one.url))


def _delivery_row(one: DeliveryView) -> Row:
    last = one.attempts[-1] if one.attempts else None
    answer = "" if last is None else f"HTTP {last.status_code}" if last.status_code else last.error or ""
    following = _clock(one.next_attempt_at) if one.next_attempt_at else ""
    of, attempts = str(one.data.get("id", "")), str(len(one.attempts))
    return Row((one.id, one.event_type, of, one.status, attempts, answer, following))


def _clock(at_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))

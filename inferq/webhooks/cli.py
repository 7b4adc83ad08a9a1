"""``inferq webhooks``: the options of its commands. Their work is in :mod:`inferq.webhooks.views`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..commands.options import DEFAULT_URL, ApiKey, AsJson, RouterUrl
from ..exit_codes import run_for_code

if TYPE_CHECKING:
    from .client import WebhookClient

webhook_app = typer.Typer(help="Hear what ended: have events of batches and background responses sent to a URL.")

EndpointId = Annotated[str, typer.Argument(help="The endpoint's id, as `inferq webhooks list` shows it.")]


@webhook_app.command("add")
def webhook_add(
    url: Annotated[str, typer.Argument(help="https://..., where events are sent to.")],
    events: Annotated[str, typer.Option("--events", "-e", help="Types, as batch.completed,batch.failed.")] = "*",
    name: Annotated[str, typer.Option(help="For people.")] = "",
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """Have events sent to a URL. Prints the secret of the signatures, once."""
    from .views import add_endpoint  # noqa: PLC0415

    client = _client(router_url, api_key)
    asked = [part.strip() for part in events.split(",") if part.strip()]
    run_for_code(lambda: add_endpoint(client, url, asked, name, as_json=as_json))


@webhook_app.command("list")
def webhook_list(router_url: RouterUrl = DEFAULT_URL, api_key: ApiKey = "", as_json: AsJson = False) -> None:
    """Your endpoints, newest first."""
    from .views import list_endpoints  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: list_endpoints(client, as_json=as_json))


@webhook_app.command("show")
def webhook_show(
    endpoint_id: EndpointId, router_url: RouterUrl = DEFAULT_URL, api_key: ApiKey = "", as_json: AsJson = False
) -> None:
    """One of them; its secret is not shown."""
    from .views import show_endpoint  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: show_endpoint(client, endpoint_id, as_json=as_json))


@webhook_app.command("remove")
def webhook_remove(
    endpoint_id: EndpointId, router_url: RouterUrl = DEFAULT_URL, api_key: ApiKey = "", as_json: AsJson = False
) -> None:
    """Send nothing more to it, and forget what was sent."""
    from .views import remove_endpoint  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: remove_endpoint(client, endpoint_id, as_json=as_json))


@webhook_app.command("rotate")
def webhook_rotate(
    endpoint_id: EndpointId,
    keep_s: Annotated[int, typer.Option(min=0, help="How long the old secret signs too; 0 if it leaked.")] = 86_400,
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """Sign with a new secret, which is printed once, and for a while with the old one too."""
    from .views import rotate_secret  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: rotate_secret(client, endpoint_id, keep_s, as_json=as_json))


@webhook_app.command("enable")
def webhook_enable(
    endpoint_id: EndpointId, router_url: RouterUrl = DEFAULT_URL, api_key: ApiKey = "", as_json: AsJson = False
) -> None:
    """Send to it again, after it was disabled: by you, or because it answered 410."""
    from .views import set_enabled  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: set_enabled(client, endpoint_id, enabled=True, as_json=as_json))


@webhook_app.command("disable")
def webhook_disable(
    endpoint_id: EndpointId, router_url: RouterUrl = DEFAULT_URL, api_key: ApiKey = "", as_json: AsJson = False
) -> None:
    """Send nothing to it until it is enabled; what ends meanwhile is not told later."""
    from .views import set_enabled  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: set_enabled(client, endpoint_id, enabled=False, as_json=as_json))


@webhook_app.command("test")
def webhook_test(
    endpoint_id: EndpointId,
    event: Annotated[str, typer.Option("--event", "-e", help="The type of the sample.")] = "batch.completed",
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """Send a sample event now. Exit code 1 if the endpoint does not take it."""
    from .views import test_endpoint  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: test_endpoint(client, endpoint_id, event, as_json=as_json))


@webhook_app.command("deliveries")
def webhook_deliveries(
    endpoint_id: EndpointId,
    limit: Annotated[int, typer.Option(min=1, help="Show no more than the newest so many.")] = 20,
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """What was sent to it, and what it answered."""
    from .views import list_deliveries  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: list_deliveries(client, endpoint_id, limit, as_json=as_json))


def _client(router_url: str, api_key: str) -> WebhookClient:
    from .client import WebhookClient  # noqa: PLC0415

    return WebhookClient(router_url, api_key=api_key)

"""``inferq webhooks``: the options of its commands. Their work is in :mod:`inferq.webhooks.views`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..exit_codes import run_for_code
from ..option_blocks import with_blocks
from ..options import AsJson, NewestLimit, RouterOptions

webhook_app = typer.Typer(help="Send an HTTP callback when a batch or background response finishes.")

EndpointId = Annotated[str, typer.Argument(help="Id of the endpoint, from `inferq webhooks list`.")]


@webhook_app.command("add")
@with_blocks
def webhook_add(
    router: RouterOptions,
    url: Annotated[str, typer.Argument(help="https:// URL that receives the events.")],
    events: Annotated[
        str, typer.Option("--events", "-e", help="Event types, such as batch.completed,batch.failed. Default: all.")
    ] = "*",
    name: Annotated[str, typer.Option(help="A name for the endpoint.")] = "",
    as_json: AsJson = False,
) -> None:
    """Create an endpoint. Prints its signing secret, which is not shown again."""
    from .client import WebhookClient  # noqa: PLC0415
    from .views import add_endpoint  # noqa: PLC0415

    client = router.client(WebhookClient)
    asked = [part.strip() for part in events.split(",") if part.strip()]
    run_for_code(lambda: add_endpoint(client, url, asked, name, as_json=as_json))


@webhook_app.command("list")
@with_blocks
def webhook_list(router: RouterOptions, as_json: AsJson = False) -> None:
    """List your endpoints, newest first."""
    from .client import WebhookClient  # noqa: PLC0415
    from .views import list_endpoints  # noqa: PLC0415

    client = router.client(WebhookClient)
    run_for_code(lambda: list_endpoints(client, as_json=as_json))


@webhook_app.command("show")
@with_blocks
def webhook_show(router: RouterOptions, endpoint_id: EndpointId, as_json: AsJson = False) -> None:
    """Show an endpoint, without its secret."""
    from .client import WebhookClient  # noqa: PLC0415
    from .views import show_endpoint  # noqa: PLC0415

    client = router.client(WebhookClient)
    run_for_code(lambda: show_endpoint(client, endpoint_id, as_json=as_json))


@webhook_app.command("remove")
@with_blocks
def webhook_remove(router: RouterOptions, endpoint_id: EndpointId, as_json: AsJson = False) -> None:
    """Delete an endpoint and the log of its deliveries."""
    from .client import WebhookClient  # noqa: PLC0415
    from .views import remove_endpoint  # noqa: PLC0415

    client = router.client(WebhookClient)
    run_for_code(lambda: remove_endpoint(client, endpoint_id, as_json=as_json))


@webhook_app.command("rotate")
@with_blocks
def webhook_rotate(
    router: RouterOptions,
    endpoint_id: EndpointId,
    keep_s: Annotated[
        int, typer.Option(min=0, help="Seconds for which the old secret stays valid; 0 if it leaked.")
    ] = 86_400,
    as_json: AsJson = False,
) -> None:
    """Replace the signing secret and print the new one, which is not shown again."""
    from .client import WebhookClient  # noqa: PLC0415
    from .views import rotate_secret  # noqa: PLC0415

    client = router.client(WebhookClient)
    run_for_code(lambda: rotate_secret(client, endpoint_id, keep_s, as_json=as_json))


@webhook_app.command("enable")
@with_blocks
def webhook_enable(router: RouterOptions, endpoint_id: EndpointId, as_json: AsJson = False) -> None:
    """Enable an endpoint that you or the notifier disabled."""
    from .client import WebhookClient  # noqa: PLC0415
    from .views import set_enabled  # noqa: PLC0415

    client = router.client(WebhookClient)
    run_for_code(lambda: set_enabled(client, endpoint_id, enabled=True, as_json=as_json))


@webhook_app.command("disable")
@with_blocks
def webhook_disable(router: RouterOptions, endpoint_id: EndpointId, as_json: AsJson = False) -> None:
    """Disable an endpoint. Events that happen meanwhile are not sent later."""
    from .client import WebhookClient  # noqa: PLC0415
    from .views import set_enabled  # noqa: PLC0415

    client = router.client(WebhookClient)
    run_for_code(lambda: set_enabled(client, endpoint_id, enabled=False, as_json=as_json))


@webhook_app.command("test")
@with_blocks
def webhook_test(
    router: RouterOptions,
    endpoint_id: EndpointId,
    event: Annotated[str, typer.Option("--event", "-e", help="Event type of the sample.")] = "batch.completed",
    as_json: AsJson = False,
) -> None:
    """Send a sample event now. Exit code 1 unless the endpoint answers with success."""
    from .client import WebhookClient  # noqa: PLC0415
    from .views import test_endpoint  # noqa: PLC0415

    client = router.client(WebhookClient)
    run_for_code(lambda: test_endpoint(client, endpoint_id, event, as_json=as_json))


@webhook_app.command("deliveries")
@with_blocks
def webhook_deliveries(
    router: RouterOptions,
    endpoint_id: EndpointId,
    limit: NewestLimit = 20,
    as_json: AsJson = False,
) -> None:
    """List the deliveries of an endpoint, newest first, with its answers."""
    from .client import WebhookClient  # noqa: PLC0415
    from .views import list_deliveries  # noqa: PLC0415

    client = router.client(WebhookClient)
    run_for_code(lambda: list_deliveries(client, endpoint_id, limit, as_json=as_json))

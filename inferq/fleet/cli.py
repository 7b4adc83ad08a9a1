"""``inferq queues``, ``inferq workers`` and ``inferq dead``: their options. Their work is in the other modules here."""

from __future__ import annotations

from typing import Annotated

import typer

from ..option_blocks import with_blocks
from ..options import AsJson, FleetOptions, run

fleet_app = typer.Typer()
"""Commands at the top level."""
dead_app = typer.Typer(help="Dead letters: requests whose attempts all failed.")

LetterIds = Annotated[list[str] | None, typer.Argument(help="Ids of dead letters, from `inferq dead list`.")]


@fleet_app.command(rich_help_panel="Inspect and repair")
@with_blocks
def queues(
    fleet: FleetOptions,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Repeat until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show what waits and what runs, by model and lane."""
    from .client import FleetClient  # noqa: PLC0415
    from .views import show_queues  # noqa: PLC0415

    client = fleet.client(FleetClient)
    run(lambda: show_queues(client, watch=watch, interval_s=interval, as_json=as_json))


@fleet_app.command(rich_help_panel="Inspect and repair")
@with_blocks
def workers(fleet: FleetOptions, as_json: AsJson = False) -> None:
    """Show the workers: state, engine, load and models."""
    from .client import FleetClient  # noqa: PLC0415
    from .views import show_workers  # noqa: PLC0415

    client = fleet.client(FleetClient)
    run(lambda: show_workers(client, as_json=as_json))


@dead_app.command("list")
@with_blocks
def dead_list(
    fleet: FleetOptions,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number to show, oldest first.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List dead letters: time, model, cause and worker."""
    from .client import FleetClient  # noqa: PLC0415
    from .dead_letters import list_letters  # noqa: PLC0415

    client = fleet.client(FleetClient)
    run(lambda: list_letters(client, limit=limit, as_json=as_json))


@dead_app.command("show")
@with_blocks
def dead_show(
    fleet: FleetOptions,
    letter_id: Annotated[str, typer.Argument(help="Id of a dead letter, from `inferq dead list`.")],
    as_json: AsJson = False,
) -> None:
    """Show a dead letter with its request, as the client sent it."""
    from .client import FleetClient  # noqa: PLC0415
    from .dead_letters import show_letter  # noqa: PLC0415

    client = fleet.client(FleetClient)
    run(lambda: show_letter(client, letter_id, as_json=as_json))


@dead_app.command("replay")
@with_blocks
def dead_replay(fleet: FleetOptions, letter_ids: LetterIds = None) -> None:
    """Send the requests of dead letters again, print the answers, and remove the letters that were answered."""
    from .client import FleetClient  # noqa: PLC0415
    from .dead_letters import replay_letters  # noqa: PLC0415

    client = fleet.client(FleetClient)
    run(lambda: replay_letters(client, letter_ids or []))


@dead_app.command("purge")
@with_blocks
def dead_purge(
    fleet: FleetOptions,
    letter_ids: LetterIds = None,
    older_than_h: Annotated[float | None, typer.Option(min=0, help="Remove all that are older, in hours.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all.")] = False,
) -> None:
    """Remove dead letters: those named, those older than --older-than-h, or --all."""
    from .client import FleetClient  # noqa: PLC0415
    from .dead_letters import purge_letters  # noqa: PLC0415

    if sum((bool(letter_ids), older_than_h is not None, everything)) != 1:
        raise typer.BadParameter("name dead letters, or give --older-than-h, or --all")
    client = fleet.client(FleetClient)
    older_than_s = older_than_h * 3600 if older_than_h is not None else None
    run(lambda: purge_letters(client, letter_ids or [], older_than_s=older_than_s))

"""``inferq conformance``: its options. Its work is in the other modules here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import AsJson

conformance_app = typer.Typer(help="Check a worker of your own, or a Router, by the worker protocol.")

Only = Annotated[list[str] | None, typer.Option("--rule", help="Check this rule alone; repeatable.")]


@conformance_app.command("worker", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def worker(
    command: Annotated[list[str] | None, typer.Argument(help="What starts the worker, behind --.")] = None,
    listen: Annotated[
        str, typer.Option(help="HOST:PORT of the scripted Router, for a worker that you start yourself.")
    ] = "",
    rule: Only = None,
    log: Annotated[Path | None, typer.Option(help="File for the worker's output.")] = None,
    as_json: AsJson = False,
) -> None:
    """Play a Router for a worker, and check it by every rule of docs/worker-protocol.md."""
    from .commands import check_worker  # noqa: PLC0415

    raise typer.Exit(check_worker(command or [], listen=listen, only=rule or [], log=log, as_json=as_json))

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
    patience: Annotated[float, typer.Option(min=0.1, help="Multiplies all time limits: more on a slow machine.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Play a Router for a worker, and check it by every rule of docs/worker-protocol.md."""
    from .commands import check_worker  # noqa: PLC0415

    code = check_worker(command or [], listen=listen, only=rule or [], log=log, patience=patience, as_json=as_json)
    raise typer.Exit(code)


@conformance_app.command("router")
def router(
    url: Annotated[str, typer.Argument(help="Base URL of the Router.")],
    key: Annotated[str, typer.Option(envvar="INFERQ_WORKER_KEY", help="A worker's credential there.")] = "",
    join_token: Annotated[str, typer.Option(envvar="INFERQ_JOIN_TOKEN", help="The join token, without a key.")] = "",
    api_key: Annotated[str, typer.Option(envvar="INFERQ_API_KEY", help="An API key, for requests.")] = "",
    name: Annotated[str, typer.Option(help="The name that the key is for.")] = "",
    model: Annotated[str, typer.Option(help="A model that the key allows and nobody else serves.")] = "",
    rule: Only = None,
    as_json: AsJson = False,
) -> None:
    """Play workers for a Router, honest ones and liars, and check it by the same page."""
    from .commands import check_router  # noqa: PLC0415

    code = check_router(
        url,
        key=key,
        join_token="" if key else join_token,
        api_key=api_key,
        names=(name, model),
        only=rule or [],
        as_json=as_json,
    )
    raise typer.Exit(code)

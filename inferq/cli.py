"""The command line ``inferq``: its top-level commands, and the groups of commands in their packages."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from inferq import __version__
from queue_schemas import BadRequest

from .batch.cli import batch_app
from .commands.simulate_options import EngineModelOptions, PolicyOptions, ReportOptions, TraceOptions
from .conformance.cli import conformance_app
from .fleet.cli import dead_app, fleet_app
from .invocation import check_arguments, run_command
from .jobs.cli import jobs_app
from .on_ray.cli import ray_app
from .option_blocks import with_blocks
from .options import (
    DATA_DIR,
    DEFAULT_URL,
    AsJson,
    DataDir,
    EngineOptions,
    EngineUrl,
    FleetOptions,
    PortOptions,
    RedisUrl,
    RouterOptions,
    run,
    stack_options,
)
from .webhooks.cli import webhook_app

_ROLE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_RUN, _USE, _LOOK = "Run", "Use", "Inspect and repair"

app = typer.Typer(
    help="A durable queue in front of your vLLM servers, behind the OpenAI API.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
"""Every command. Commands import what they need when they are called: `inferq --version` is quick."""


def main() -> None:
    """The program. An error of ours is one sentence on standard error and exit code 2; anything else is a bug."""
    sys.exit(run_command(_command))


def _command() -> None:
    check_arguments(sys.argv[1:])
    app(prog_name="inferq")


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """A durable queue in front of your vLLM servers, behind the OpenAI API."""
    if version:
        typer.echo(f"inferq {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    else:
        from telemetry import configure_logging  # noqa: PLC0415

        # A role configures its own logging; other commands print only what a person must see.
        configure_logging("inferq", "warning", "auto")


@app.command(rich_help_panel=_RUN)
@with_blocks
def up(
    engines: EngineOptions,
    ports: PortOptions,
    redis_url: RedisUrl = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Start everything on this machine (queue, Manager, Router, workers, engines) until Ctrl-C."""
    from .commands.up import bring_up  # noqa: PLC0415

    raise typer.Exit(bring_up(stack_options(engines, ports, data_dir), redis_url=redis_url, as_json=as_json))


@app.command(rich_help_panel=_RUN)
@with_blocks
def demo(
    router: RouterOptions,
    engines: EngineOptions,
    ports: PortOptions,
    redis_url: RedisUrl = None,
    data_dir: DataDir = DATA_DIR,
    prompts: Annotated[
        Path | None,
        typer.Option(envvar="INFERQ_DEMO_PROMPTS", help="File of prompts (.jsonl, .jsonl.gz) to use instead of ours."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a chat, a streamed chat and 20 prompts to a running inferq, or to one started for the demo."""
    from .chat.client import ChatClient  # noqa: PLC0415
    from .commands.demo import read_prompts, run_demo  # noqa: PLC0415

    asked = stack_options(engines, ports, data_dir)
    url = f"http://127.0.0.1:{ports.router_port}" if ports.router_port else router.router_url
    client = RouterOptions(url, router.api_key).client(ChatClient)
    raise typer.Exit(run_demo(client, asked, read_prompts(prompts), redis_url=redis_url, as_json=as_json))


@app.command(rich_help_panel=_RUN)
def setup(as_json: AsJson = False) -> None:
    """Install vLLM and its default model, as the first `inferq up` does, and start nothing."""
    from .commands.setup import set_up  # noqa: PLC0415

    set_up(as_json=as_json)


@app.command(context_settings=_ROLE, add_help_option=False, rich_help_panel=_RUN)
def manager(context: typer.Context) -> None:
    """Run a Manager: worker registry, assignments and failure detection. Options: inferq manager --help."""
    from .commands.roles import run_manager  # noqa: PLC0415

    raise typer.Exit(run_manager(context.args))


@app.command(context_settings=_ROLE, add_help_option=False, rich_help_panel=_RUN)
def router(context: typer.Context) -> None:
    """Run a Router: the OpenAI API in front of the queue. Options: inferq router --help."""
    from .commands.roles import run_router  # noqa: PLC0415

    raise typer.Exit(run_router(context.args))


@app.command(context_settings=_ROLE, add_help_option=False, rich_help_panel=_RUN)
def worker(context: typer.Context) -> None:
    """Run a worker beside its engine. Options: inferq worker --help."""
    from .commands.roles import run_worker  # noqa: PLC0415

    raise typer.Exit(run_worker(context.args))


@app.command(context_settings=_ROLE, add_help_option=False, rich_help_panel=_RUN)
def batcher(context: typer.Context) -> None:
    """Run a batcher: it runs batches over the queue. Options: inferq batcher --help."""
    from .commands.roles import run_batcher  # noqa: PLC0415

    raise typer.Exit(run_batcher(context.args))


@app.command(context_settings=_ROLE, add_help_option=False, rich_help_panel=_RUN)
def notifier(context: typer.Context) -> None:
    """Run a notifier: it sends webhooks. Options: inferq notifier --help."""
    from .commands.roles import run_notifier  # noqa: PLC0415

    raise typer.Exit(run_notifier(context.args))


@app.command(context_settings=_ROLE, add_help_option=False, rich_help_panel=_RUN)
def autoscale() -> None:
    """Start and drain the workers of one model as its queue asks. Options: inferq autoscale --help."""
    from .commands.roles import run_autoscaler  # noqa: PLC0415

    raise typer.Exit(run_autoscaler(sys.argv[2:]))  # the context's arguments lack the --


app.add_typer(ray_app, name="ray", no_args_is_help=True, rich_help_panel=_RUN)


@app.command(rich_help_panel=_USE)
@with_blocks
def chat(
    router: RouterOptions,
    prompt: Annotated[str, typer.Argument(help="One question. Without it, a conversation.")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="Model. Default: the first that is served.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Sampling temperature.")] = 0.7,
    as_json: AsJson = False,
) -> None:
    """Chat with a model: one question, or a conversation."""
    from .chat.client import ChatClient  # noqa: PLC0415
    from .chat.views import chat_once, converse  # noqa: PLC0415

    if as_json and not prompt:
        raise BadRequest("--json prints one answer: give a question, as in `inferq chat --json 'Hello'`")
    client = router.client(ChatClient)
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    if prompt:
        run(lambda: chat_once(client, model, prompt, system=system, parameters=sampling, as_json=as_json))
    else:
        run(lambda: converse(client, model, system=system, parameters=sampling))


app.add_typer(batch_app, name="batch", no_args_is_help=True, rich_help_panel=_USE)
app.add_typer(jobs_app, name="jobs", no_args_is_help=True, rich_help_panel=_USE)
app.add_typer(webhook_app, name="webhooks", no_args_is_help=True, rich_help_panel=_USE)
app.add_typer(fleet_app)
app.add_typer(dead_app, name="dead", no_args_is_help=True, rich_help_panel=_LOOK)
app.add_typer(conformance_app, name="conformance", no_args_is_help=True, rich_help_panel=_LOOK)


@app.command(rich_help_panel=_USE)
@with_blocks
def simulate(
    trace: Annotated[
        str,
        typer.Argument(
            help="File (.jsonl: Mooncake's, .csv: Azure's, perhaps .gz), or a generator: poisson:rate=20,requests=1000."
        ),
    ],
    requests: TraceOptions,
    policies: PolicyOptions,
    engine: EngineModelOptions,
    report: ReportOptions,
    as_json: AsJson = False,
) -> None:
    """Replay a trace against a simulated fleet: inferq's policy beside others, with an engine model."""
    from .commands.simulate import run_simulations  # noqa: PLC0415

    run_simulations(trace, requests, policies, engine, report, as_json=as_json)


@app.command(rich_help_panel=_LOOK)
def config(
    table: Annotated[
        list[str] | None,
        typer.Argument(
            help="router, manager, worker, batches, ray, autoscale, broker, storage, webhooks, notifier, telemetry."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show every setting: its value, where it comes from, and what it means."""
    from .commands.settings import show_settings  # noqa: PLC0415

    show_settings(table or [], as_json=as_json)


@app.command(rich_help_panel=_LOOK)
@with_blocks
def doctor(
    context: typer.Context,
    fleet: FleetOptions,
    redis_url: RedisUrl = None,
    engine_url: EngineUrl = None,
    data_dir: DataDir = DATA_DIR,
    repair_queue: Annotated[
        bool,
        typer.Option(
            "--repair-queue",
            help="Cut the embedded queue's file at its first damage, and keep the old file beside it.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check an installation, and say how to fix what is wrong. Exit code 1 if something is."""
    from broker import BrokerSettings  # noqa: PLC0415

    from .doctor.cli import DoctorTarget, examine, repair, show_findings  # noqa: PLC0415
    from .fleet.client import FleetClient  # noqa: PLC0415

    if repair_queue:
        repair(data_dir)
    source = context.get_parameter_source("router_url")
    url_was_given = source is not None and source.name != "DEFAULT"
    examined = DoctorTarget(
        redis_url=BrokerSettings.load(redis_url=redis_url).redis_url,
        client=fleet.client(FleetClient),
        data_dir=data_dir,
        engine_url=engine_url or "",
        router_named=url_was_given or fleet.router_url != DEFAULT_URL,
    )
    raise typer.Exit(show_findings(asyncio.run(examine(examined)), as_json=as_json))

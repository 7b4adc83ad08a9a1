"""The command line. Each command's work is in :mod:`inferq.commands`; here are its options."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer

from inferq import __version__
from queue_schemas import BadRequest

from .batch.cli import batch_app
from .commands.options import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    ClusterAddress,
    DataDir,
    Engine,
    EngineUrl,
    JoinToken,
    ManagerPort,
    Model,
    RedisUrl,
    RouterPort,
    RouterUrl,
    ServedModelName,
    Slots,
    VllmArgs,
    VllmCommand,
    WorkerPort,
    Workers,
    open_client,
    stack_options,
)
from .invocation import check_arguments, run_command
from .jobs.cli import jobs_app
from .webhooks.cli import webhook_app

DATA_DIR = Path(".inferq")
_ROLE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    help="A durable queue in front of your vLLM servers, behind the OpenAI API.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
"""Every command. Those with work to do load it when they are called: `inferq --version` is quick."""

ray_app = typer.Typer(help="The fabric in a Ray cluster: Manager as an actor, Routers as a Serve application.")
app.add_typer(ray_app, name="ray", no_args_is_help=True)
app.add_typer(batch_app, name="batch", no_args_is_help=True)
app.add_typer(webhook_app, name="webhooks", no_args_is_help=True)
app.add_typer(jobs_app, name="jobs", no_args_is_help=True)
dead_app = typer.Typer(help="Requests that were given up after all their attempts.")
app.add_typer(dead_app, name="dead", no_args_is_help=True)


def main() -> None:
    """The program. An error of ours is one sentence on standard error and exit code 2; anything else is a bug."""
    sys.exit(run_command(_command))


def _command() -> None:
    check_arguments(sys.argv[1:])
    app(prog_name="inferq")


def _was_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def _run(work: Callable[[], Awaitable[None]]) -> None:
    from telemetry.http.server import run_process  # noqa: PLC0415

    raise typer.Exit(run_process(work))


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

        # A role sets its own up; of the other commands only what a person must see.
        configure_logging("inferq", "warning", "auto")


@app.command()
def up(
    engine: Engine = None,
    model: Model = None,
    workers: Workers = 1,
    slots: Slots = None,
    router_port: RouterPort = None,
    manager_port: ManagerPort = None,
    worker_port: WorkerPort = None,
    redis_url: RedisUrl = None,
    engine_url: EngineUrl = None,
    served_model_name: ServedModelName = None,
    vllm_command: VllmCommand = None,
    vllm_args: VllmArgs = "",
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Start the whole fabric on this machine: queue, Manager, Router, workers and engines, until Ctrl-C."""
    from .commands.up import bring_up  # noqa: PLC0415

    asked = stack_options(
        engine=engine,
        engine_url=engine_url,
        model=model,
        served_model_name=served_model_name,
        vllm_command=vllm_command,
        vllm_args=vllm_args,
        workers=workers,
        slots=slots,
        router_port=router_port,
        manager_port=manager_port,
        worker_port=worker_port,
        data_dir=data_dir,
    )
    raise typer.Exit(bring_up(asked, redis_url=redis_url, as_json=as_json))


@app.command()
def demo(
    engine: Engine = None,
    model: Model = None,
    workers: Workers = 1,
    slots: Slots = None,
    router_url: RouterUrl = DEFAULT_URL,
    router_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="The Router's port on this machine, running or to be started.")
    ] = None,
    manager_port: ManagerPort = None,
    worker_port: WorkerPort = None,
    api_key: ApiKey = "",
    redis_url: RedisUrl = None,
    engine_url: EngineUrl = None,
    served_model_name: ServedModelName = None,
    vllm_command: VllmCommand = None,
    vllm_args: VllmArgs = "",
    data_dir: DataDir = DATA_DIR,
    prompts: Annotated[
        Path | None,
        typer.Option(envvar="INFERQ_DEMO_PROMPTS", help="A file of prompts instead of ours (.jsonl, .jsonl.gz)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show it at work: a chat, a streamed chat, 20 prompts at once; on a running fabric or one of its own."""
    from .commands.demo import read_prompts, run_demo  # noqa: PLC0415

    asked = stack_options(
        engine=engine,
        engine_url=engine_url,
        model=model,
        served_model_name=served_model_name,
        vllm_command=vllm_command,
        vllm_args=vllm_args,
        workers=workers,
        slots=slots,
        router_port=router_port,
        manager_port=manager_port,
        worker_port=worker_port,
        data_dir=data_dir,
    )
    client = open_client(f"http://127.0.0.1:{router_port}" if router_port else router_url, api_key)
    batch = read_prompts(prompts)
    raise typer.Exit(run_demo(client, asked, batch, redis_url=redis_url, as_json=as_json))


@app.command()
def setup(as_json: AsJson = False) -> None:
    """Only prepare vLLM and its default model, as `inferq up` does the first time."""
    from .commands.setup import set_up  # noqa: PLC0415

    set_up(as_json=as_json)


@app.command(context_settings=_ROLE, add_help_option=False)
def manager(context: typer.Context) -> None:
    """Run a Manager: who is alive, who pulls what. Options: inferq manager --help."""
    from .commands.roles import run_manager  # noqa: PLC0415

    raise typer.Exit(run_manager(context.args))


@app.command(context_settings=_ROLE, add_help_option=False)
def router(context: typer.Context) -> None:
    """Run a Router: the OpenAI API in front of the queue. Options: inferq router --help."""
    from .commands.roles import run_router  # noqa: PLC0415

    raise typer.Exit(run_router(context.args))


@app.command(context_settings=_ROLE, add_help_option=False)
def worker(context: typer.Context) -> None:
    """Run a worker beside its engine. Options: inferq worker --help."""
    from .commands.roles import run_worker  # noqa: PLC0415

    raise typer.Exit(run_worker(context.args))


@app.command(context_settings=_ROLE, add_help_option=False)
def batcher(context: typer.Context) -> None:
    """Run a batcher: it works batches off over the queue. Options: inferq batcher --help."""
    from .commands.roles import run_batcher  # noqa: PLC0415

    raise typer.Exit(run_batcher(context.args))


@app.command(context_settings=_ROLE, add_help_option=False)
def notifier(context: typer.Context) -> None:
    """Send webhooks. Options: inferq notifier --help."""
    from .commands.roles import run_notifier  # noqa: PLC0415

    raise typer.Exit(run_notifier(context.args))


@app.command()
def chat(
    prompt: Annotated[str, typer.Argument(help="One question; without it, a conversation.")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="Default: the first that is served.")] = "",
    system: Annotated[str, typer.Option(help="A system message to begin with.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """Talk to a model through the fabric: one question, or a conversation."""
    from .commands.chat import chat_once, converse  # noqa: PLC0415

    if as_json and not prompt:
        raise BadRequest("--json describes one answer: give the question too, as in `inferq chat --json 'Hello'`")
    client = open_client(router_url, api_key)
    if prompt:
        _run(
            lambda: chat_once(
                client,
                model,
                prompt,
                system=system,
                max_tokens=max_tokens,
                temperature=temperature,
                as_json=as_json,
            )
        )
    else:
        _run(lambda: converse(client, model, system=system, max_tokens=max_tokens, temperature=temperature))


@app.command()
def queues(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again and again, until Ctrl-C or the pipe's end.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    join_token: JoinToken = "",
    as_json: AsJson = False,
) -> None:
    """What waits and what runs, per model and lane."""
    from .commands.queues import show_queues  # noqa: PLC0415

    client = open_client(router_url, api_key, join_token)
    _run(lambda: show_queues(client, watch=watch, interval_s=interval, as_json=as_json))


@app.command()
def workers(
    router_url: RouterUrl = DEFAULT_URL, api_key: ApiKey = "", join_token: JoinToken = "", as_json: AsJson = False
) -> None:
    """The fleet: who is alive, what each serves, how busy it is."""
    from .commands.queues import show_workers  # noqa: PLC0415

    client = open_client(router_url, api_key, join_token)
    _run(lambda: show_workers(client, as_json=as_json))


@app.command()
def config(
    table: Annotated[
        list[str] | None,
        typer.Argument(help="router, manager, worker, batches, ray, broker, storage, webhooks, notifier, telemetry."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Every setting in force, where its value comes from, and what it means."""
    from .commands.settings import show_settings  # noqa: PLC0415

    show_settings(table or [], as_json=as_json)


@app.command()
def doctor(
    context: typer.Context,
    redis_url: RedisUrl = None,
    engine_url: EngineUrl = None,
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    join_token: JoinToken = "",
    data_dir: DataDir = DATA_DIR,
    repair_queue: Annotated[
        bool,
        typer.Option(
            "--repair-queue",
            help="Cut the embedded queue's file at its first damage, and keep it as it was beside it.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check what the fabric needs, and say how to mend what is not right. Exit code 1 if something must be."""
    from broker import BrokerSettings  # noqa: PLC0415

    from .doctor.cli import Examined, examine, repair, show_findings  # noqa: PLC0415

    if repair_queue:
        repair(data_dir)
    examined = Examined(
        redis_url=BrokerSettings.load(redis_url=redis_url).redis_url,
        client=open_client(router_url, api_key, join_token),
        data_dir=data_dir,
        engine_url=engine_url or "",
        router_named=router_url != DEFAULT_URL or _was_given(context, "router_url"),
    )
    raise typer.Exit(show_findings(asyncio.run(examine(examined)), as_json=as_json))


@ray_app.command("up")
def ray_up(
    address: ClusterAddress = None,
    redis_url: Annotated[
        str | None,
        typer.Option(envvar="INFERQ_REDIS_URL", help="The Redis or Valkey; default: that of an `inferq up` here."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address of the way in. Default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65_535, help="Port of the way in. Default 8000.")] = None,
    way_in: Annotated[str | None, typer.Option(help="replica (the default), or serve: Serve's own proxy.")] = None,
    min_replicas: Annotated[int | None, typer.Option(min=1, help="Routers that always run. Default 2.")] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Most Routers. Default 8.")] = None,
    dashboard_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Default 8265; 0: a free one. For a cluster of our own.")
    ] = None,
    head_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Default: a free one. For a cluster of our own.")
    ] = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Start the fabric in Ray, or change it in place while it serves. Every other setting: `inferq config ray`."""
    from .commands.ray import ray_up as bring_up  # noqa: PLC0415

    asked = {
        "address": address,
        "host": host,
        "port": port,
        "way_in": way_in,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "dashboard_port": dashboard_port,
        "head_port": head_port,
        "data_dir": str(data_dir),
    }
    raise typer.Exit(bring_up(asked, redis_url=redis_url, as_json=as_json))


@ray_app.command("status")
def ray_status(address: ClusterAddress = None, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """What runs in Ray. Exit code 0: all is well, 1: something is not, 2: no cluster answers."""
    from .commands.ray import ray_status as show_status  # noqa: PLC0415

    raise typer.Exit(show_status({"address": address, "data_dir": str(data_dir)}, as_json=as_json))


@ray_app.command("down")
def ray_down(address: ClusterAddress = None, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Take the fabric out of Ray, finishing what runs; a cluster that `inferq ray up` started ends with it."""
    from .commands.ray import ray_down as take_down  # noqa: PLC0415

    raise typer.Exit(take_down({"address": address, "data_dir": str(data_dir)}, as_json=as_json))


LetterIds = Annotated[list[str] | None, typer.Argument(help="Ids of letters, as `inferq dead list` shows them.")]


@dead_app.command("list")
def dead_list(
    limit: Annotated[int, typer.Option(min=1, help="Show no more than the oldest so many.")] = 100,
    router_url: RouterUrl = DEFAULT_URL,
    join_token: JoinToken = "",
    as_json: AsJson = False,
) -> None:
    """The dead letters: when, which model, why, on which worker."""
    from .commands.dead import list_letters  # noqa: PLC0415

    client = open_client(router_url, "", join_token)
    _run(lambda: list_letters(client, limit=limit, as_json=as_json))


@dead_app.command("show")
def dead_show(
    letter_id: str, router_url: RouterUrl = DEFAULT_URL, join_token: JoinToken = "", as_json: AsJson = False
) -> None:
    """One letter with its request, as the client sent it."""
    from .commands.dead import show_letter  # noqa: PLC0415

    client = open_client(router_url, "", join_token)
    _run(lambda: show_letter(client, letter_id, as_json=as_json))


@dead_app.command("replay")
def dead_replay(
    letter_ids: LetterIds = None,
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    join_token: JoinToken = "",
) -> None:
    """Ask again what was given up, print the answer, and remove the letter if there was one."""
    from .commands.dead import replay_letters  # noqa: PLC0415

    client = open_client(router_url, api_key, join_token)
    _run(lambda: replay_letters(client, letter_ids or []))


@dead_app.command("purge")
def dead_purge(
    letter_ids: LetterIds = None,
    older_than_h: Annotated[float | None, typer.Option(min=0, help="All that are older, in hours.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    router_url: RouterUrl = DEFAULT_URL,
    join_token: JoinToken = "",
) -> None:
    """Remove letters: those named, those older than --older-than-h, or --all."""
    from .commands.dead import purge_letters  # noqa: PLC0415

    if sum((bool(letter_ids), older_than_h is not None, everything)) != 1:
        raise typer.BadParameter("name letters, or give --older-than-h, or --all")
    client = open_client(router_url, "", join_token)
    older_than_s = older_than_h * 3600 if older_than_h is not None else None
    _run(lambda: purge_letters(client, letter_ids or [], older_than_s=older_than_s))

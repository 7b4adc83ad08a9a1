"""Options that several commands share. Imports little: `inferq --version` and `--help` come through here too."""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from queue_schemas import CannotStart

if TYPE_CHECKING:
    from inferq.client import RouterClient
    from inferq.stack import StackOptions

    Client = TypeVar("Client", bound=RouterClient)

DEFAULT_URL = "http://127.0.0.1:18000"
DATA_DIR = Path(".inferq")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
RouterUrl = Annotated[str, typer.Option(envvar="INFERQ_ROUTER_URL", help="URL of the Router.")]
ApiKey = Annotated[str, typer.Option(envvar="INFERQ_API_KEY", help="API key, if the Router requires one.")]
JoinToken = Annotated[
    str, typer.Option(envvar="INFERQ_JOIN_TOKEN", help="Join token of the fleet, if it has one.", show_envvar=True)
]
NewestLimit = Annotated[int, typer.Option(min=1, help="Maximum number to show, newest first.")]
RedisUrl = Annotated[
    str | None,
    typer.Option(envvar="INFERQ_REDIS_URL", help="Redis or Valkey to use instead of the embedded one."),
]
EngineUrl = Annotated[
    str | None,
    typer.Option(envvar="INFERQ_WORKER_ENGINE_URL", help="Base URL of an OpenAI-compatible server that runs already."),
]
DataDir = Annotated[
    Path, typer.Option(envvar="INFERQ_DATA_DIR", help="Folder for the embedded queue's data and for logs.")
]


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """How to reach the Router as a client."""

    router_url: RouterUrl = DEFAULT_URL
    api_key: ApiKey = ""

    def client(self, kind: type[Client]) -> Client:
        """A client of that kind."""
        return kind(self.router_url, api_key=self.api_key)


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How to reach the Router as an operator."""

    router_url: RouterUrl = DEFAULT_URL
    api_key: ApiKey = ""
    join_token: JoinToken = ""

    def client(self, kind: type[Client]) -> Client:
        """A client of that kind."""
        return kind(self.router_url, api_key=self.api_key, join_token=self.join_token)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The engines and workers of `inferq up` and `inferq demo`."""

    engine: Annotated[
        str | None,
        typer.Option(envvar="INFERQ_WORKER_ENGINE", help="vllm (the default), sim, or url (implied by --engine-url)."),
    ] = None
    engine_url: EngineUrl = None
    model: Annotated[
        str | None,
        typer.Option(
            envvar="INFERQ_WORKER_MODEL", help="Model id or folder for vLLM. Default: a small model, prepared once."
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        typer.Option(envvar="INFERQ_WORKER_SERVED_MODEL_NAME", help="Name by which clients request the model."),
    ] = None
    vllm_command: Annotated[
        str | None,
        typer.Option(envvar="INFERQ_WORKER_VLLM_COMMAND", help="Your own vllm executable."),
    ] = None
    vllm_args: Annotated[
        str,
        typer.Option(envvar="INFERQ_WORKER_VLLM_ARGS", help="More arguments for `vllm serve`, quoted as in a shell."),
    ] = ""
    workers: Annotated[int, typer.Option(min=0, max=64, help="Number of workers, each with its own engine.")] = 1
    slots: Annotated[int | None, typer.Option(min=1, help="Concurrent requests of each worker.")] = None


@dataclass(frozen=True, slots=True)
class PortOptions:
    """The ports of `inferq up` and `inferq demo`."""

    router_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Port of the Router. Default 18000; 0: a free port.")
    ] = None
    manager_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Port of the Manager. Default 9000; 0: a free port.")
    ] = None
    worker_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65_535,
            help="Port of the first worker; the others take the next ones. Default 7000; 0: free ports.",
        ),
    ] = None


def stack_options(engines: EngineOptions, ports: PortOptions, data_dir: Path) -> StackOptions:
    """The stack that those options describe. Raises ``CannotStart`` if they contradict each other."""
    from inferq.stack.plan import StackOptions, choose_engine  # noqa: PLC0415

    return StackOptions(
        engine=choose_engine(engines.engine, engines.engine_url),
        engine_url=engines.engine_url,
        model=engines.model,
        served_model_name=engines.served_model_name,
        vllm_command=engines.vllm_command,
        vllm_args=_words(engines.vllm_args),
        workers=engines.workers,
        slots=engines.slots,
        router_port=ports.router_port,
        manager_port=ports.manager_port,
        worker_port=ports.worker_port,
        data_dir=data_dir,
    )


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work`` on an event loop and end the command with its exit code."""
    from telemetry.http.server import run_process  # noqa: PLC0415

    raise typer.Exit(run_process(work))


def _words(vllm_args: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(vllm_args))
    except ValueError as error:
        raise CannotStart(
            f"--vllm-args (INFERQ_WORKER_VLLM_ARGS) {vllm_args!r} is not quoted as in a shell: {error}"
        ) from None

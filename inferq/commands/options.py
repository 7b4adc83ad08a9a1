"""Options that several commands share. Imports little: `inferq --version` and `--help` come through here too."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from queue_schemas import CannotStart

if TYPE_CHECKING:
    from inferq.client import FabricClient
    from inferq.stack import StackOptions

DEFAULT_URL = "http://127.0.0.1:18000"

RouterUrl = Annotated[str, typer.Option(envvar="INFERQ_ROUTER_URL", help="The Router to ask.")]
ApiKey = Annotated[str, typer.Option(envvar="INFERQ_API_KEY", help="API key, if the Router wants one.")]
JoinToken = Annotated[
    str, typer.Option(envvar="INFERQ_JOIN_TOKEN", help="The fleet's secret, if it has one.", show_envvar=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, for scripts.")]


def open_client(router_url: str = DEFAULT_URL, api_key: str = "", join_token: str = "") -> FabricClient:
    """The client that those options describe."""
    from inferq.client import FabricClient  # noqa: PLC0415 - loaded by the commands that need it

    return FabricClient(router_url, api_key=api_key, join_token=join_token)


# What a stack is made of: `inferq up` and `inferq demo`.
Engine = Annotated[
    str | None,
    typer.Option(envvar="INFERQ_WORKER_ENGINE", help="vllm (the default), sim, or url with --engine-url."),
]
EngineUrl = Annotated[
    str | None,
    typer.Option(envvar="INFERQ_WORKER_ENGINE_URL", help="Serve an OpenAI-compatible server that runs already."),
]
Model = Annotated[
    str | None,
    typer.Option(envvar="INFERQ_WORKER_MODEL", help="Model id or folder for vLLM; default: a small one, made once."),
]
ServedModelName = Annotated[
    str | None,
    typer.Option(envvar="INFERQ_WORKER_SERVED_MODEL_NAME", help="Name under which clients ask for the model."),
]
VllmCommand = Annotated[
    str | None, typer.Option(envvar="INFERQ_WORKER_VLLM_COMMAND", help="A vllm executable of your own.")
]
VllmArgs = Annotated[
    str, typer.Option(envvar="INFERQ_WORKER_VLLM_ARGS", help="Further arguments of `vllm serve`, as in a shell.")
]
Workers = Annotated[int, typer.Option(min=0, max=64, help="How many workers, each with an engine of its own.")]
Slots = Annotated[int | None, typer.Option(min=1, help="Requests that each worker runs at once.")]
RouterPort = Annotated[int | None, typer.Option(min=0, max=65_535, help="Default 18000; 0: a free one.")]
ManagerPort = Annotated[int | None, typer.Option(min=0, max=65_535, help="Default 9000; 0: a free one.")]
WorkerPort = Annotated[
    int | None, typer.Option(min=0, max=65_535, help="Port of the first worker, the others follow. Default 7000.")
]
RedisUrl = Annotated[
    str | None,
    typer.Option(envvar="INFERQ_REDIS_URL", help="A Redis or Valkey to use instead of the embedded one."),
]
DataDir = Annotated[
    Path, typer.Option(envvar="INFERQ_DATA_DIR", help="Folder of the embedded queue's data and of the logs.")
]

ClusterAddress = Annotated[
    str | None,
    typer.Option(envvar="INFERQ_RAY_ADDRESS", help="A Ray cluster: host:port, or auto. Default: one of our own."),
]


def stack_options(
    *,
    engine: str | None,
    engine_url: str | None,
    model: str | None,
    served_model_name: str | None,
    vllm_command: str | None,
    vllm_args: str,
    workers: int,
    slots: int | None,
    router_port: int | None,
    manager_port: int | None,
    worker_port: int | None,
    data_dir: Path,
) -> StackOptions:
    """The stack that those options ask for. Raises ``CannotStart`` if they contradict each other."""
    from inferq.stack.plan import StackOptions, choose_engine  # noqa: PLC0415

    return StackOptions(
        engine=choose_engine(engine, engine_url),
        engine_url=engine_url,
        model=model,
        served_model_name=served_model_name,
        vllm_command=vllm_command,
        vllm_args=_words(vllm_args),
        workers=workers,
        slots=slots,
        router_port=router_port,
        manager_port=manager_port,
        worker_port=worker_port,
        data_dir=data_dir,
    )


def _words(vllm_args: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(vllm_args))
    except ValueError as error:
        raise CannotStart(
            f"--vllm-args (INFERQ_WORKER_VLLM_ARGS) {vllm_args!r} is not written as in a shell: {error}"
        ) from None

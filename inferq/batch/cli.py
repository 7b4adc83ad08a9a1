"""``inferq batch``: the options of its commands. Their work is in :mod:`inferq.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from queue_schemas import BadRequest

from ..commands.options import DEFAULT_URL, ApiKey, AsJson, RouterUrl
from ..exit_codes import run_for_code

if TYPE_CHECKING:
    from .client import BatchClient
    from .input import Format

batch_app = typer.Typer(
    help="Run a file of requests in the background: submit, watch, fetch. Exit codes for scripts: 0 done, 1 it ended "
    "with trouble, 2 it could not be asked, 3 it has not ended yet."
)

BatchId = Annotated[str, typer.Argument(help="The batch's id, as `inferq batch list` shows it.")]
Watched = Annotated[bool, typer.Option("--watch", "-w", help="Stay until it has ended. Ctrl-C leaves it running.")]


@batch_app.command("submit")
def submit_batch(
    file: Annotated[
        Path, typer.Argument(help="Requests or prompts: .jsonl, .csv, .tsv, .txt, also .gz; - is standard input.")
    ],
    watch: Watched = False,
    model: Annotated[str, typer.Option("--model", "-m", help="For prompts. Default: the first that is served.")] = "",
    endpoint: Annotated[
        str, typer.Option(help="Default: that of the requests; for prompts /v1/chat/completions.")
    ] = "",
    template: Annotated[
        str, typer.Option("--template", "-t", help="The prompt, with columns: 'Summarise: {text}'. {{ }} are braces.")
    ] = "",
    system: Annotated[str, typer.Option(help="A system message before each prompt.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="Another field of each request, as temperature=0.")
    ] = None,
    id_column: Annotated[
        str, typer.Option(help="The column of the custom_id. Default: custom_id, task_id or id, else line-N.")
    ] = "",
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, kept with the batch; repeatable.")] = None,
    window: Annotated[str, typer.Option(help="How long the batch may take, of what the Router offers.")] = "24h",
    form: Annotated[
        str, typer.Option("--format", help="jsonl, csv, tsv or txt, where the file's name does not say.")
    ] = "",
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """Upload requests, or prompts to make them of, and run them as a batch."""
    from .input import Shape, read_parameter  # noqa: PLC0415
    from .submit import Submission, submit  # noqa: PLC0415

    shape = Shape(
        model=model,
        endpoint=endpoint,
        system=system,
        max_tokens=max_tokens,
        template=template,
        id_column=id_column,
        parameters=dict(read_parameter(text) for text in parameter or ()),
    )
    asked = Submission(path=file, form=_format(form), shape=shape, window=window, metadata=_pairs(metadata or []))
    client = _client(router_url, api_key)
    run_for_code(lambda: submit(client, asked, watched=watch, as_json=as_json))


@batch_app.command("status")
def batch_status(
    batch_id: BatchId,
    watch: Watched = False,
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """How a batch stands."""
    from .views import show_status  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: show_status(client, batch_id, watched=watch, as_json=as_json))


@batch_app.command("list")
def batch_list(
    limit: Annotated[int, typer.Option(min=1, help="Show no more than the newest so many.")] = 20,
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """Your batches, newest first."""
    from .views import list_batches  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: list_batches(client, limit=limit, as_json=as_json))


@batch_app.command("cancel")
def batch_cancel(
    batch_id: BatchId, router_url: RouterUrl = DEFAULT_URL, api_key: ApiKey = "", as_json: AsJson = False
) -> None:
    """End a batch early. The lines that are done are kept."""
    from .views import cancel_batch  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: cancel_batch(client, batch_id, as_json=as_json))


@batch_app.command("results")
def batch_results(
    batch_id: BatchId,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to; - is standard output.")] = Path("-"),
    text: Annotated[bool, typer.Option("--text", help="Only custom_id and text of each answer.")] = False,
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Fetch the answers (JSON lines). A download that was cut short goes on where it stopped."""
    from .results import fetch_results  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: fetch_results(client, batch_id, output, texts=text))


@batch_app.command("errors")
def batch_errors(
    batch_id: BatchId, router_url: RouterUrl = DEFAULT_URL, api_key: ApiKey = "", as_json: AsJson = False
) -> None:
    """Why a batch was refused, and every line without a good answer."""
    from .views import show_errors  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: show_errors(client, batch_id, as_json=as_json))


def _client(router_url: str, api_key: str) -> BatchClient:
    from .client import BatchClient  # noqa: PLC0415

    return BatchClient(router_url, api_key=api_key)


def _format(text: str) -> Format | None:
    from .input import FORMATS  # noqa: PLC0415

    if not text:
        return None
    for known in FORMATS:
        if text == known:
            return known
    raise BadRequest(f"--format {text}: choose {', '.join(FORMATS)}")


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise BadRequest(f"--metadata {text!r} is not KEY=VALUE")
        pairs[name] = value
    return pairs

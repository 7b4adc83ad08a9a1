"""``inferq batch``: the options of its commands. Their work is in the other modules of this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from queue_schemas import BadRequest

from ..exit_codes import run_for_code
from ..option_blocks import with_blocks
from ..options import AsJson, NewestLimit, RouterOptions

if TYPE_CHECKING:
    from .input import Format

batch_app = typer.Typer(
    help="Run files of requests as batches.\n\nExit codes: 0 success, 1 the batch ended with errors, 2 the command "
    "failed, 3 the batch has not ended yet."
)

BatchId = Annotated[str, typer.Argument(help="Id of the batch, from `inferq batch list`.")]
Watched = Annotated[bool, typer.Option("--watch", "-w", help="Wait until it has ended. Ctrl-C leaves it running.")]


@batch_app.command("submit")
@with_blocks
def submit_batch(
    router: RouterOptions,
    file: Annotated[
        Path, typer.Argument(help="Requests or prompts: .jsonl, .csv, .tsv or .txt, also .gz; - reads standard input.")
    ],
    watch: Watched = False,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model for prompts. Default: the first that is served.")
    ] = "",
    endpoint: Annotated[
        str, typer.Option(help="Endpoint. Default: that of the requests; for prompts /v1/chat/completions.")
    ] = "",
    template: Annotated[
        str,
        typer.Option(
            "--template", "-t", help="Prompt with column names, as 'Summarise: {text}'. Write braces as {{ }}."
        ),
    ] = "",
    system: Annotated[str, typer.Option(help="System message for each prompt.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum tokens of each answer.")] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", help="Another field of each request, such as temperature=0; repeatable."),
    ] = None,
    id_column: Annotated[
        str, typer.Option(help="Column with the custom_id. Default: custom_id, task_id or id, else line-N.")
    ] = "",
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE to store with the batch; repeatable.")] = None,
    window: Annotated[str, typer.Option(help="Completion window, one that the Router offers.")] = "24h",
    form: Annotated[
        str, typer.Option("--format", help="jsonl, csv, tsv or txt, if the file's name does not tell.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Upload requests, or prompts that become requests, and run them as a batch."""
    from .client import BatchClient  # noqa: PLC0415
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
    client = router.client(BatchClient)
    run_for_code(lambda: submit(client, asked, watched=watch, as_json=as_json))


@batch_app.command("status")
@with_blocks
def batch_status(
    router: RouterOptions,
    batch_id: BatchId,
    watch: Watched = False,
    as_json: AsJson = False,
) -> None:
    """Show the state of a batch."""
    from .client import BatchClient  # noqa: PLC0415
    from .views import show_status  # noqa: PLC0415

    client = router.client(BatchClient)
    run_for_code(lambda: show_status(client, batch_id, watched=watch, as_json=as_json))


@batch_app.command("list")
@with_blocks
def batch_list(
    router: RouterOptions,
    limit: NewestLimit = 20,
    as_json: AsJson = False,
) -> None:
    """List your batches, newest first."""
    from .client import BatchClient  # noqa: PLC0415
    from .views import list_batches  # noqa: PLC0415

    client = router.client(BatchClient)
    run_for_code(lambda: list_batches(client, limit=limit, as_json=as_json))


@batch_app.command("cancel")
@with_blocks
def batch_cancel(router: RouterOptions, batch_id: BatchId, as_json: AsJson = False) -> None:
    """Cancel a batch. Answers that have arrived are kept."""
    from .client import BatchClient  # noqa: PLC0415
    from .views import cancel_batch  # noqa: PLC0415

    client = router.client(BatchClient)
    run_for_code(lambda: cancel_batch(client, batch_id, as_json=as_json))


@batch_app.command("results")
@with_blocks
def batch_results(
    router: RouterOptions,
    batch_id: BatchId,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; - is standard output.")] = Path("-"),
    text: Annotated[bool, typer.Option("--text", help="Write only the custom_id and text of each answer.")] = False,
) -> None:
    """Download the answers as JSON lines. A broken download continues where it stopped."""
    from .client import BatchClient  # noqa: PLC0415
    from .results import fetch_results  # noqa: PLC0415

    client = router.client(BatchClient)
    run_for_code(lambda: fetch_results(client, batch_id, output, texts=text))


@batch_app.command("errors")
@with_blocks
def batch_errors(router: RouterOptions, batch_id: BatchId, as_json: AsJson = False) -> None:
    """Show why a batch was refused, and every line without a successful answer."""
    from .client import BatchClient  # noqa: PLC0415
    from .views import show_errors  # noqa: PLC0415

    client = router.client(BatchClient)
    run_for_code(lambda: show_errors(client, batch_id, as_json=as_json))


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

"""``inferq batch submit``: make a batch of a file of prompts or requests."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, cast

from inferq.batch.client import BatchClient, BatchView, fields_of
from inferq.batch.input import Format, Prepared, Shape, Source, open_source
from inferq.console import err, out, print_json

from ..chat.views import choose_model
from .views import print_end
from .watch import exit_code, watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The arguments of `inferq batch submit`."""

    path: Path
    form: Format | None = None
    shape: Shape = field(default_factory=Shape)
    window: str = "24h"
    metadata: dict[str, str] = field(default_factory=dict)


async def submit(client: BatchClient, asked: Submission, *, watched: bool, as_json: bool) -> int:
    """Prepare and upload the file, create the batch, and watch it if ``watched``; the exit code."""
    async with client:
        with _advice_if_interrupted():
            batch = await _create(client, asked)
        if not watched:
            if as_json:
                print_json(fields_of(batch))
            else:
                out.print(batch.id)
                err.print(f"Watch it with: inferq batch status {batch.id} --watch", highlight=False)
            return 0
        err.print(batch.id, highlight=False)
        batch = await watch(client, batch.id)
    if as_json:
        print_json(fields_of(batch))
    else:
        print_end(batch)
    return exit_code(batch)


async def _create(client: BatchClient, asked: Submission) -> BatchView:
    with tempfile.TemporaryDirectory(prefix="inferq-batch-") as folder, open_source(asked.path, asked.form) as source:
        path = Path(folder) / "requests.jsonl"
        shape = asked.shape
        if not source.whole and not shape.model:
            shape = replace(shape, model=await choose_model(client))
        prepared = await asyncio.to_thread(_write, source, shape, path)
        size_mb = path.stat().st_size / 1e6
        err.print(f"Uploading {prepared.lines} requests to {prepared.endpoint}, {size_mb:.1f} MB ...", highlight=False)
        file_id = await client.upload(path, _upload_name(asked.path))
        return await client.create(file_id, prepared.endpoint, asked.window, asked.metadata or None)


def _write(source: Source, shape: Shape, path: Path) -> Prepared:
    with path.open("wb") as file:
        return source.write(shape, cast(BinaryIO, file))


def _upload_name(path: Path) -> str:
    name = "input" if str(path) == "-" else path.name.removesuffix(".gz")
    return name if name.endswith(".jsonl") else f"{name}.jsonl"


@contextlib.contextmanager
def _advice_if_interrupted() -> Iterator[None]:
    try:
        yield
    except asyncio.CancelledError:
        err.print("\nNo batch is known to be created; `inferq batch list` shows your batches.")
        raise

"""``inferq batch results``: download the answers of a batch to a file or standard output."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import orjson
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from inferq.batch.client import BatchClient, BatchView
from inferq.client import RequestFailed
from inferq.console import err
from queue_schemas import BadRequest

from .lines import lines_of, text_of
from .watch import EXIT_RUNNING

STANDARD_OUTPUT = Path("-")


async def fetch_results(client: BatchClient, batch_id: str, into: Path, *, texts: bool) -> int:
    """Write the output file to ``into``, or with ``texts`` only the texts of the answers; the exit code.

    An existing file is replaced once everything has arrived. A broken download continues where it stopped, also in
    another call.
    """
    async with client:
        batch = await client.batch(batch_id)
        file_id = batch.output_file_id
        if file_id is None:
            return _nothing(batch)
        if texts:
            count = await _write_texts(client, file_id, into)
            err.print(f"{count} texts")
        elif into == STANDARD_OUTPUT:
            async for piece in client.content(file_id, 0, await client.size(file_id)):
                _to_standard_output(piece)
        else:
            await _download(client, file_id, into)
            err.print(f"{batch.request_counts.completed} answers in {into}", markup=False)
    if batch.request_counts.failed:
        err.print(f"{batch.request_counts.failed} lines have no answer: inferq batch errors {batch.id}", markup=False)
    return 0


def _nothing(batch: BatchView) -> int:
    if not batch.ended:
        err.print(f"{batch.id} is {batch.status}: wait with inferq batch status {batch.id} --watch", markup=False)
        return EXIT_RUNNING
    err.print(f"{batch.id} is {batch.status} and has no answers: inferq batch errors {batch.id}", markup=False)
    return 1


async def _download(client: BatchClient, file_id: str, into: Path) -> None:
    size = await client.size(file_id)
    part = into.with_name(f".{into.name}.{file_id}.part")
    try:
        with part.open("ab") as file:
            _lock(file, into)
            start = file.tell()
            if start > size:
                file.truncate(0)
                start = 0
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
            with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
                task = bar.add_task("", total=size, completed=start)
                async for piece in client.content(file_id, start, size):
                    file.write(piece)
                    bar.advance(task, len(piece))
            file.flush()
            os.fsync(file.fileno())
        part.replace(into)
    except OSError as error:
        raise BadRequest(f"{into} cannot be written: {error.strerror or error}") from error
    except RequestFailed as refused:
        raise RequestFailed(
            f"{refused.message}. What has arrived is kept: the same command continues from there",
            http_status=refused.http_status,
        ) from refused


def _lock(file: BinaryIO, into: Path) -> None:
    """Lock the file: two downloads to one file would mix their bytes."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadRequest(f"{into} is being written by another `inferq batch results`") from None


async def _write_texts(client: BatchClient, file_id: str, into: Path) -> int:
    count = 0
    if into == STANDARD_OUTPUT:
        async for line in _texts(client, file_id):
            _to_standard_output(line)
            count += 1
        return count
    part = into.with_name(f".{into.name}.{file_id}.texts.part")
    try:
        with part.open("wb") as file:
            async for line in _texts(client, file_id):
                file.write(line)
                count += 1
        part.replace(into)
    except OSError as error:
        raise BadRequest(f"{into} cannot be written: {error.strerror or error}") from error
    return count


async def _texts(client: BatchClient, file_id: str) -> AsyncIterator[bytes]:
    async for line in lines_of(client, file_id):
        said = {"custom_id": line.get("custom_id"), "text": text_of(line)}
        yield orjson.dumps(said, option=orjson.OPT_APPEND_NEWLINE)


def _to_standard_output(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()

"""Convert prompts, tables and requests into the input file of a batch: one JSON request per line, OpenAI's format.

Accepted are whole requests (passed on unchanged), JSON lines with a ``prompt`` or ``messages``, a table with columns
for a template, and plain text with a prompt on each line; each also gzipped. Files are read and written line by line.
"""

from __future__ import annotations

import csv
import gzip
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import orjson

from queue_schemas import BadRequest

Format = Literal["jsonl", "csv", "tsv", "txt"]
CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES = (
    *("/v1/chat/completions", "/v1/completions"),
    *("/v1/embeddings", "/v1/responses"),
)
FORMATS: tuple[Format, ...] = ("jsonl", "csv", "tsv", "txt")

_BY_SUFFIX: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
}
_IDS = ("custom_id", "task_id", "id")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_MAX_CELL = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How to make a request of each prompt. Empty or None: not given."""

    model: str = ""
    endpoint: str = ""
    system: str = ""
    max_tokens: int | None = None
    template: str = ""
    id_column: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def for_prompts(self) -> bool:
        """Whether it sets anything that whole requests set themselves."""
        given = (self.model, self.system, self.template, self.id_column, self.parameters)
        return any(given) or self.max_tokens is not None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A written input file: the endpoint of its requests, and their number."""

    endpoint: str
    lines: int


@dataclass(frozen=True, slots=True)
class _Row:
    """The fields of one line, and its place: ``prompts.csv line 7``."""

    place: str
    number: int
    fields: Mapping[str, Any]


def read_parameter(text: str) -> tuple[str, Any]:
    """``temperature=0`` as a name and a value, which is JSON where it can be and else text. Raises ``BadRequest``."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise BadRequest(f"{text!r} is not NAME=VALUE, as in temperature=0")
    try:
        return name, orjson.loads(value)
    except orjson.JSONDecodeError:
        return name, value


class Source:
    """An open source file, from :func:`open_source`."""

    def __init__(self, first: _Row, rest: Iterator[_Row]) -> None:
        self._first = first
        self._rest = rest

    @property
    def whole(self) -> bool:
        """Whether it has whole requests, which name their model themselves."""
        return "custom_id" in self._first.fields and isinstance(self._first.fields.get("body"), dict)

    def write(self, shape: Shape, into: BinaryIO) -> Prepared:
        """Write the batch's input file. Raises ``BadRequest`` with file and line for invalid input. Call it once."""
        rows = chain((self._first,), self._rest)
        if self.whole:
            endpoint = self._endpoint(shape)
            requests: Iterator[Mapping[str, Any]] = (row.fields for row in rows)
        else:
            endpoint = shape.endpoint or CHAT
            requests = (_request(row, endpoint, shape) for row in rows)
        count = 0
        for request in requests:
            into.write(orjson.dumps(request, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
        return Prepared(endpoint, count)

    def _endpoint(self, shape: Shape) -> str:
        place = self._first.place
        if shape.for_prompts:
            raise BadRequest(
                f"{place} is a whole request: --model, --system, --template, --max-tokens, --id-column and --param "
                "are for prompts"
            )
        endpoint = shape.endpoint or self._first.fields.get("url")
        if not isinstance(endpoint, str):
            raise BadRequest(f"{place} names no url: add it to each line, or give --endpoint")
        return endpoint


@contextmanager
def open_source(path: Path, form: Format | None) -> Iterator[Source]:
    """Open ``path`` (``-``: standard input). Raises ``BadRequest`` if it cannot be read or is empty."""
    form = form or format_of(path)
    with _lines(path) as lines:
        rows = _rows(path, lines, form)
        first = next(rows, None)
        if first is None:
            raise BadRequest(f"{path} has no lines with requests")
        yield Source(first, rows)


def format_of(path: Path) -> Format:
    """The format, by the file's name. Raises ``BadRequest``."""
    name = path.with_suffix("") if path.suffix == ".gz" else path
    found = _BY_SUFFIX.get(name.suffix.lower())
    if found is None:
        raise BadRequest(f"{path}: the format is unknown by its name: give --format, one of {', '.join(FORMATS)}")
    return found


def fill(template: str, row: Mapping[str, Any], place: str) -> str:
    """``template`` with ``{column}`` replaced; ``{{`` and ``}}`` are braces. Raises ``BadRequest``."""

    def value(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        if found[1] not in row:
            has = ", ".join(map(str, row)) or "nothing"
            raise BadRequest(f"{place} has no {found[1]!r} for the template; it has: {has}")
        cell = row[found[1]]
        return cell if isinstance(cell, str) else orjson.dumps(cell).decode()

    return _FIELD.sub(value, template)


def _request(row: _Row, endpoint: str, shape: Shape) -> dict[str, Any]:
    body = _body(row, endpoint, shape)
    return {
        "custom_id": _custom_id(row, shape.id_column),
        "method": "POST",
        "url": endpoint,
        "body": {"model": shape.model, **body, **shape.parameters},
    }


def _body(row: _Row, endpoint: str, shape: Shape) -> dict[str, Any]:
    if shape.system and endpoint not in {CHAT, RESPONSES}:
        raise BadRequest(f"--system cannot be used with {endpoint}")
    if shape.max_tokens is not None and endpoint == EMBEDDINGS:
        raise BadRequest(f"--max-tokens cannot be used with {endpoint}")
    limit = {} if shape.max_tokens is None else {"max_tokens": shape.max_tokens}
    match endpoint:
        case "/v1/chat/completions":
            own = None if shape.template else row.fields.get("messages")
            messages = own if isinstance(own, list) else [{"role": "user", "content": _prompt(row, shape)}]
            opening = [{"role": "system", "content": shape.system}] if shape.system else []
            return {"messages": [*opening, *messages], **limit}
        case "/v1/completions":
            return {"prompt": _prompt(row, shape), **limit}
        case "/v1/embeddings":
            return {"input": _prompt(row, shape)}
        case "/v1/responses":
            instructions = {"instructions": shape.system} if shape.system else {}
            longest = {} if shape.max_tokens is None else {"max_output_tokens": shape.max_tokens}
            return {"input": _prompt(row, shape), **instructions, **longest}
        case _:
            raise BadRequest(
                f"prompts can be sent to {CHAT}, {COMPLETIONS}, {EMBEDDINGS} and {RESPONSES}; for {endpoint} "
                'give whole requests: {"custom_id", "method", "url", "body"} on each line'
            )


def _prompt(row: _Row, shape: Shape) -> str:
    if shape.template:
        return fill(shape.template, row.fields, row.place)
    prompt = row.fields.get("prompt")
    if isinstance(prompt, str):
        return prompt
    has = ", ".join(map(str, row.fields)) or "nothing"
    raise BadRequest(
        f"{row.place} has no text 'prompt'; it has: {has}. Make one with --template, as in "
        "--template 'Summarise: {text}'"
    )


def _custom_id(row: _Row, column: str) -> str:
    if column and column not in row.fields:
        raise BadRequest(f"{row.place} has no {column!r}, which --id-column names; it has: {', '.join(row.fields)}")
    names = (column,) if column else _IDS
    found = next((row.fields[name] for name in names if row.fields.get(name) not in (None, "")), None)
    if found is None:
        if column:
            raise BadRequest(f"{row.place}: {column!r} is empty but must be the custom_id")
        return f"line-{row.number}"
    return str(found)


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[tuple[int, str]]]:
    """The numbered lines of a file (``-``: standard input), line ends included."""

    def decoded(file: Iterable[bytes]) -> Iterator[tuple[int, str]]:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise BadRequest(f"{path} line {number} is not UTF-8: {error.reason}; save the file as UTF-8") from None
        except (OSError, EOFError) as error:
            raise BadRequest(f"{path} cannot be read behind line {number}: {error}") from error

    if str(path) == "-":
        yield decoded(sys.stdin.buffer)
        return
    try:
        opened = path.open("rb")
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}") from error
    with opened as file:
        if path.suffix != ".gz":
            yield decoded(file)
            return
        with gzip.open(file) as unpacked:
            yield decoded(cast(Iterable[bytes], unpacked))


def _rows(path: Path, lines: Iterator[tuple[int, str]], form: Format) -> Iterator[_Row]:
    if form in {"csv", "tsv"}:
        yield from _table_rows(path, lines, "\t" if form == "tsv" else ",")
        return
    for number, line in lines:
        if not line.strip():
            continue
        place = f"{path} line {number}"
        if form == "txt":
            text = line.rstrip("\r\n")
            yield _Row(place, number, {"prompt": text, "text": text})
            continue
        try:
            found = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"{place} is not JSON: {error.msg}") from None
        if not isinstance(found, dict):
            raise BadRequest(f"{place} is not a JSON object")
        yield _Row(place, number, found)


def _table_rows(path: Path, lines: Iterator[tuple[int, str]], delimiter: str) -> Iterator[_Row]:
    csv.field_size_limit(_MAX_CELL)
    at = 0

    def texts() -> Iterator[str]:
        nonlocal at
        for at, line in lines:  # noqa: B007 - used in the errors below
            yield line

    reader = csv.DictReader(texts(), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            place = f"{path} line {at}"
            if None in row:
                raise BadRequest(f"{place} has more cells than the first line has columns")
            if None in row.values():
                raise BadRequest(f"{place} has fewer cells than the first line has columns")
            yield _Row(place, at, row)
    except csv.Error as error:
        raise BadRequest(f"{path} line {at} is not a table: {error}") from None

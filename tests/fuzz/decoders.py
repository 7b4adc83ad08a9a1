"""Feed the decoders: whatever their input, they accept or refuse it in bounded time."""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError
from yarl import URL

from batches.core.jsonl import BadLine, LineSplitter, read_line, request_in
from openai_api.chat_chunks import ChatReader
from queue_schemas import END, HEAD, Frame, Heartbeat, InferqError, Job, Lane, Pool, Registration, Tenant, WorkerInfo
from queue_schemas.control import parse_control
from queue_schemas.frames import Marker, MarkerKind, split_frames, unpack_frames, unpack_marker
from queue_schemas.ids import JobId
from router.files.form import FileForm
from router.inference.merging.attempt_merger import AttemptMerger
from router.inference.request_fields import read_fields
from router.responses.chat_request import as_chat
from router.webhooks.rules import read_new_endpoint
from webhooks.core.url_rules import UrlRules, check_url, is_public

from .mutations import Json, Mutator

Target = Callable[[Mutator], None]

CHAT: Json = {
    "model": "sim",
    "messages": [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
        },
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "n": 1,
    "max_tokens": 4,
    "priority": 0,
    "timeout": 5,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "response_format": {"type": "text"},
}
RESPONSE: Json = {
    "model": "sim",
    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
    "instructions": "be brief",
    "text": {"format": {"type": "text"}},
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}],
    "tool_choice": "auto",
    "metadata": {"a": "b"},
    "include": [],
    "max_output_tokens": 16,
    "background": True,
    "store": True,
}
ENDPOINT: Json = {"url": "https://hooks.example.com/x", "event_types": ["batch.completed"], "name": "mine"}
LINE: Json = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "sim", "messages": []},
}
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/tokenize")
_JOB_ID = JobId("0-" + "a" * 32)
_MAX_LINE_BYTES = 64 * 1024
_RULES = UrlRules()
_URLS = (
    "https://hooks.example.com/x?y=1", "https://[2606:4700::1]:8443/", "https://8.8.8.8/", "https://127.0.0.1/",
    "https://[::ffff:10.0.0.1]/", "https://[64:ff9b::7f00:1]/", "https://localhost/", "https://a.internal/",
)  # fmt: skip
_URL_WORDS = (
    "@", "#", "?", "/", "\\", ":", "[", "]", "%", ".", "..", "//", "0x7f", "127.1", "2130706433", "::1", "\u3002",
    "localhost", ".local", "%00", "\t", "user:pw@", "https:", "HTTP://", "169.254.169.254", "\u00e4", "1e100", ":0",
)  # fmt: skip
_CHUNK = (
    b'data: {"id":"c","object":"chat.completion.chunk",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"hi"},"finish_reason":null}]}\n\n'
)
_STREAM = _CHUNK + b": comment\n\n" + _CHUNK.replace(b"null", b'"stop"') + b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Broken(Exception):
    """A promise that an input broke."""

    what: str


def json_bodies(mutator: Mutator) -> None:
    """Bodies of inference requests."""
    path = mutator.pick(PATHS)
    body = json.dumps(mutator.json_of(CHAT)).encode() if mutator.chance(0.6) else mutator.bytes_of(_CHAT_BYTES)
    _answer_or_refuse(lambda: read_fields(body, "application/json", path))


def response_bodies(mutator: Mutator) -> None:
    """Responses requests that are built from chats."""
    _answer_or_refuse(lambda: as_chat(mutator.json_of(RESPONSE)))


def forms(mutator: Mutator) -> None:
    """Multipart forms of inference requests, and of files in pieces."""
    body = mutator.bytes_of(_FORM)
    _answer_or_refuse(lambda: read_fields(body, "multipart/form-data; boundary=B", "/v1/audio/transcriptions"))

    def upload() -> None:
        form = FileForm(b"B")
        at = 0
        while at < len(body):
            step = mutator.random.randint(1, 200)
            form.feed(body[at : at + step])
            at += step
        form.finish()

    _answer_or_refuse(upload)


def batch_lines(mutator: Mutator) -> None:
    """Lines of a batch's input: refused with a reason, or read the same way twice."""
    data = json.dumps(mutator.json_of(LINE)).encode() if mutator.chance(0.5) else mutator.bytes_of(_LINE_BYTES)
    splitter = LineSplitter(_MAX_LINE_BYTES)
    at, lines = 0, []
    while at < len(data):
        step = mutator.random.randint(1, 400)
        lines += list(splitter.feed(data[at : at + step]))
        at += step
    lines += list(splitter.end())
    for line in lines:
        try:
            read = read_line(line.data, "/v1/chat/completions", _MAX_LINE_BYTES)
        except BadLine:
            continue
        assert line.data is not None
        custom_id, body, *_ = request_in(line.data, "t", "m")
        if custom_id != read.custom_id or json.loads(body).keys() != read.body.keys():
            raise Broken("a line means one thing when it is checked and another when it is sent")


def webhook_urls(mutator: Mutator) -> None:
    """URLs of tenants: what is accepted names a public host, to every parser."""
    url = str(mutator.pick(_URLS))
    for _ in range(mutator.random.randint(1, 3)):
        at = mutator.random.randint(0, len(url))
        cut = mutator.random.randint(0, 3)
        url = url[:at] + (mutator.pick(_URL_WORDS) if mutator.chance(0.8) else mutator.text()) + url[at + cut :]
    try:
        target = check_url(url, _RULES)
    except InferqError:
        return
    others = {(urlsplit(url).hostname or "").lower(), (URL(url, encoded=True).host or "").lower()}
    if others != {target.host}:
        raise Broken(f"{url!r} names {target.host!r} here and {others} elsewhere")
    try:
        address = ipaddress.ip_address(target.host)
    except ValueError:
        return
    if not is_public(address):
        raise Broken(f"{url!r} was accepted and names {address}")


def webhook_bodies(mutator: Mutator) -> None:
    """Bodies about webhook endpoints."""
    body = json.dumps(mutator.json_of(ENDPOINT)).encode()
    _answer_or_refuse(lambda: read_new_endpoint(body, _RULES))


def fabric_messages(mutator: Mutator) -> None:
    """Messages of the control plane, well typed and not."""
    message, schema = mutator.pick(_FABRIC)
    value = mutator.of_schema(schema, schema.get("$defs", {}))
    if mutator.chance(0.3):
        value = mutator.json_of(value)
    with contextlib.suppress(ValidationError):
        message.model_validate_json(json.dumps(value))


def control_entries(mutator: Mutator) -> None:
    """Entries of workers' control streams."""
    fields = {b"k": mutator.pick((b"abort", b"wake", b"drain", b"ping", b"")), b"job": _JOB_ID.encode(), b"why": b"x"}
    for name in list(fields):
        if mutator.chance(0.5):
            fields[name] = mutator.bytes_of(fields[name])
    _answer_or_refuse(lambda: parse_control(fields))


def envelopes(mutator: Mutator) -> None:
    """Jobs, as workers read them."""
    data = mutator.bytes_of(_JOB)
    _answer_or_refuse(lambda: Job.unpack(data))


def frames(mutator: Mutator) -> None:
    """Frames and markers, as Routers read them, up to the client's stream."""
    run = b"".join(
        Frame(
            _JOB_ID, mutator.pick((0, 1, 2)), mutator.pick(("a", "b")), seq,
            HEAD if not seq else mutator.pick((0, 0, END)),
            mutator.bytes_of(_STREAM) if mutator.chance(0.5) else _STREAM, 200, "text/event-stream",
        ).pack()
        for seq in range(mutator.random.randint(1, 4))
    )  # fmt: skip
    if mutator.chance(0.5):
        run = mutator.bytes_of(run)
    marker = mutator.bytes_of(Marker(mutator.pick(tuple(MarkerKind)), _JOB_ID, 1, "why").pack())
    _answer_or_refuse(lambda: split_frames(run))
    merger = AttemptMerger(stream=True, replay_limit_bytes=4_096, on_loss="restart")
    reader = ChatReader()

    def play() -> None:
        for frame in unpack_frames(run):
            reader.feed(frame)
            if not merger.closed:
                merger.on_frame(frame)
                merger.take()
        if not merger.closed:
            merger.on_marker(unpack_marker(marker))
            merger.take()

    _answer_or_refuse(play)


def _answer_or_refuse(call: Callable[[], Any]) -> None:
    try:
        call()
    except InferqError as error:
        if error.status >= 500 and error.status not in (502, 503, 504):
            raise Broken(f"refused with {error.status}: {error.message}") from error


_CHAT_BYTES = json.dumps(CHAT).encode()
_LINE_BYTES = b"\n".join([json.dumps(LINE).encode()] * 2) + b"\n"
_FORM = (
    b"".join(
        b'--B\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % part
        for part in (
            (b"model", b"", b"sim"),
            (b"purpose", b"", b"batch"),
            (b"file", b'; filename="a.jsonl"', b"x" * 50),
        )
    )
    + b"--B--\r\n"
)
_JOB = Job(
    id=_JOB_ID, tenant=Tenant("default"), model=Pool("sim"), path="/v1/chat/completions", body=_CHAT_BYTES,
    lane=Lane.INTERACTIVE,
).pack()  # fmt: skip
_FABRIC: tuple[tuple[type[BaseModel], Mapping[str, Any]], ...] = tuple(
    (message, message.model_json_schema()) for message in (Registration, Heartbeat, WorkerInfo)
)

DECODERS: Mapping[str, Target] = {
    "JSON bodies": json_bodies,
    "Responses bodies": response_bodies,
    "forms": forms,
    "batch lines": batch_lines,
    "webhook URLs": webhook_urls,
    "webhook bodies": webhook_bodies,
    "control-plane messages": fabric_messages,
    "control streams": control_entries,
    "job envelopes": envelopes,
    "frames and markers": frames,
}

"""Messages of the worker protocol in JSON and msgpack."""

from __future__ import annotations

import base64
import json

import msgpack
import pytest

from queue_schemas import BadMessage, Job, JobId, Lane, Lease, Pool, Tenant
from queue_schemas.errors import UnsupportedMediaType
from queue_schemas.worker_protocol.encoding import JSON, MSGPACK, decode, encode, media_type_of
from queue_schemas.worker_protocol.jobs import NOBODY, LeasedJob, lease_of, leased_job
from queue_schemas.worker_protocol.messages import ClaimCall
from queue_schemas.worker_protocol.output import OutputCall

TEXT = 'data: {"a": "\u00e9"}\n\n'.encode()
BINARY = b"\xff\x00\xfe"


@pytest.mark.parametrize("media_type", [JSON, MSGPACK])
@pytest.mark.parametrize("data", [[TEXT], [BINARY], [TEXT, BINARY], []])
def test_bytes_arrive_as_they_were(media_type: str, data: list[bytes]) -> None:
    """Text or not, in either form."""
    message = {"attempts": [{"lease": "l", "seq": 1, "data": data}, {"lease": "m", "seq": 2, "data": [TEXT]}]}
    found = decode(encode(message, media_type), media_type, OutputCall)
    assert [attempt.data for attempt in found.attempts] == [data, [TEXT]]


def test_text_is_written_as_text() -> None:
    """What a person reads in a log, or writes by hand; base64 only where it must be."""
    message = {"attempts": [{"data": [TEXT]}, {"data": [BINARY]}]}
    first, second = json.loads(encode(message, JSON))["attempts"]
    assert first == {"data": [TEXT.decode()]}
    assert second == {"data": [base64.b64encode(BINARY).decode()], "encoding": "base64"}


@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        (b"", JSON),
        (b"{", JSON),
        (b"[]", JSON),
        (b'{"attempts": 1}', JSON),
        (b'{"attempts": [{"lease": "l", "data": ["*"], "encoding": "base64"}]}', JSON),
        (b'{"attempts": [{"lease": "l", "data": [1]}]}', JSON),
        (b'{"attempts": [{"lease": "l", "seq": -1}]}', JSON),
        (b"\xc1", MSGPACK),
        (msgpack.packb({"attempts": [{"lease": b"l" * 3_000}]}), MSGPACK),
        (msgpack.packb({"attempts": [{}]}), MSGPACK),
        (msgpack.packb({"attempts": [{"lease": "l", "data": [1]}]}), MSGPACK),
    ],
)
def test_what_is_no_message_is_refused(body: bytes, media_type: str) -> None:
    """With one kind of error, whatever is wrong."""
    with pytest.raises(BadMessage):
        decode(body, media_type, OutputCall)


def test_unknown_fields_are_ignored() -> None:
    """The other side may be newer."""
    assert decode(b'{"shard": 0, "of_a_later_version": [1]}', JSON, ClaimCall) == ClaimCall()


def test_only_two_media_types_are_read() -> None:
    """Whatever a web page may send to any site is none of them."""
    assert media_type_of("") == media_type_of("application/json; charset=utf-8") == JSON
    assert media_type_of("Application/Vnd.MsgPack") == MSGPACK
    for name in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/msgpack"):
        with pytest.raises(UnsupportedMediaType):
            media_type_of(name)


@pytest.mark.parametrize("media_type", [JSON, MSGPACK])
def test_a_worker_gets_what_it_needs_of_a_job_and_nothing_of_who_asked(media_type: str) -> None:
    """Every field that runs the job comes through; tenant, keys and addresses do not."""
    job = Job(
        id=JobId("0-" + "a" * 32),
        tenant=Tenant("acme"),
        model=Pool("m"),
        path="/v1/chat/completions",
        body=b"\xffbody",
        lane=Lane.BATCH,
        stream=True,
        persisted=True,
        reply_to="router.1",
        idempotency_key="secret key",
        request_id="req_1",
        region="eu",
        prefix="said",
        headers={"openai-beta": "x"},
        yields=2,
        on_loss="continue",
        traceparent="00-1-2-01",
    )
    lease = Lease(job, 2, "aid", 2, 900, 5, suspect=True, predicted_ms=0)
    body = encode(leased_job(lease, "token"), media_type)
    assert b"acme" not in body
    assert b"secret" not in body
    assert b"router.1" not in body
    found = lease_of(decode(body, media_type, LeasedJob))
    assert found.job.reply_to == "token"
    assert found.job.tenant == NOBODY
    same = ("id", "model", "path", "body", "lane", "stream", "persisted", "request_id", "region", "prefix", "headers")
    same += ("yields", "on_loss", "traceparent")
    assert [getattr(found.job, name) for name in same] == [getattr(job, name) for name in same]
    assert (found.epoch, found.attempt_id, found.attempt, found.suspect, found.predicted_ms) == (2, "aid", 2, True, 0)


@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        (b'{"attempts": [], "x": [' + b"[]," * 1_500_000 + b"[]]}", JSON),
        (b'{"attempts": [], "x": {' + b'"":{},' * 1_500_000 + b'"":{}}}', JSON),
        (b'{"attempts": [], "x": "base64", "y": ' + b"[" * 1_000 + b'"base64"' + b"]" * 1_000 + b"}", JSON),
        (msgpack.packb({"attempts": [], "x": [[[] for _ in range(1_000)] for _ in range(17)]}), MSGPACK),
        (msgpack.packb({"attempts": [], "x": [{} for _ in range(16_400)]}), MSGPACK),
    ],
)
def test_a_message_takes_no_more_memory_than_its_size_lets_expect(body: bytes, media_type: str) -> None:
    """What is small to send and large once it is read is refused before it is."""
    with pytest.raises(BadMessage, match=r"too many values|lists and maps|nested"):
        decode(body, media_type, OutputCall)


def test_large_output_is_no_such_message() -> None:
    """Not even one of numbers alone, as of embeddings."""
    numbers = b"[" + b"0.1234," * (15 << 17) + b"0]"
    for media_type in (JSON, MSGPACK):
        message = {"attempts": [{"lease": "l", "seq": 1, "data": [numbers]}]}
        assert decode(encode(message, media_type), media_type, OutputCall).attempts[0].data == [numbers]

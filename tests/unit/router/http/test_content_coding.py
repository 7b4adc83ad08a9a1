"""Bodies with a Content-Encoding: decoded within every limit on bodies, or refused with what is accepted."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import orjson
import pytest

from tests.support.waiting import eventually
from tests.unit.router.fakes import Client, FakeQueue, router

BODY = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hello" * 40_000}]})
PATH = "/v1/chat/completions"
ENCODED = {
    "gzip": gzip.compress(BODY),
    "GZip": gzip.compress(BODY),
    "x-gzip": gzip.compress(BODY[:99]) + gzip.compress(b"") + gzip.compress(BODY[99:]),
    "deflate": zlib.compress(BODY),
    "identity": BODY,
    "identity, gzip": gzip.compress(BODY),
    " deflate ": zlib.compress(BODY, wbits=-15),
}


@pytest.mark.parametrize("coding", ENCODED)
@pytest.mark.parametrize("piece", [1_000_000, 1])
async def test_bodies_are_decoded(coding: str, piece: int) -> None:
    """[B7] The engine gets what the client encoded, in whatever pieces it came; deflate also without its header."""
    queue, encoded = FakeQueue("m"), ENCODED[coding]
    pieces = [encoded[at : at + piece] for at in range(0, min(len(encoded), 2_000 * piece), piece)]
    if piece == 1 and len(encoded) > 2_000:
        pieces.append(encoded[2_000:])
    async with router(queue) as app:
        headers = {"content-encoding": coding, "content-length": str(len(encoded))}
        answer = Client(app).begin("POST", PATH, pieces, headers)
        job = await queue.job()
        assert job.body == BODY
        queue.answer(job, b"1")
        assert (await answer.done()).status == 200


@pytest.mark.parametrize("coding", ["zstd", "br", "gzip, gzip", "\xff"])
@pytest.mark.parametrize("path", [PATH, "/v1/batches", "/v1/files", "/v1/webhook_endpoints", "/fabric/v1/workers"])
async def test_other_content_codings_are_refused_with_the_accepted_ones(coding: str, path: str) -> None:
    """[B7] 415 on every path that takes a body, with Accept-Encoding as RFC 9110 has it; never several layers."""
    async with router(FakeQueue("m")) as app:
        refused = await Client(app).request("POST", path, b"?", {"content-encoding": coding})
    assert (refused.status, refused.error["code"]) == (415, "unsupported_encoding")
    assert refused.headers["accept-encoding"] == "gzip, deflate"
    assert "gzip and deflate" in refused.error["message"]


@pytest.mark.parametrize(
    ("coding", "body", "words"),
    [
        ("gzip", BODY, "is not gzip"),
        ("gzip", ENCODED["gzip"][:-9], "ends before"),
        ("gzip", ENCODED["gzip"] + b"more", "is not gzip"),
        ("deflate", ENCODED["deflate"] + b"more", "is not deflate"),
        ("deflate", b"\xff\xff\xff", "is not deflate"),
        ("gzip", gzip.compress(b"") * 10_000, "next to nothing"),
        ("gzip", b"", "the body is empty"),
    ],
)
async def test_a_body_that_does_not_decode_is_refused(coding: str, body: bytes, words: str) -> None:
    """[B7] Damaged, cut off, followed by something, or made of nothing: 400 that says so."""
    async with router(FakeQueue("m")) as app:
        refused = await Client(app).request("POST", PATH, body, {"content-encoding": coding})
    assert refused.status == 400
    assert words in refused.error["message"]


@pytest.mark.parametrize("members", [1, 200])
@pytest.mark.parametrize("path", [PATH, "/v1/batches"])
async def test_decompression_bombs_stop_at_the_body_limit(members: int, path: str) -> None:
    """[B7] A body is as large as what it decodes to: one member or many, on inference paths and pages."""
    bomb = gzip.compress(b"x" * (20_000_000 // members)) * members
    async with router(FakeQueue("m"), max_body_bytes=1 << 20) as app:
        refused = await Client(app).request("POST", path, bomb, {"content-encoding": "gzip"})
        assert app.services.requests.body_bytes == 0
    assert (refused.status, refused.error["code"]) == (413, "request_too_large")


async def test_decoded_bytes_count_for_their_tenant() -> None:
    """[B7] [B9] Decoded bytes count against what a tenant may hold, and others are served meanwhile."""
    keys = ",".join(f"{hashlib.sha256(name).hexdigest()}:{name.decode()}" for name in (b"acme", b"rival"))
    queue = FakeQueue("m")
    limits = {"max_body_bytes": 300_000, "max_tenant_inflight_body_bytes": 300_000, "max_inflight_body_bytes": 600_000}
    async with router(queue, api_keys=keys, **limits) as app:
        encoded = ENCODED["gzip"]
        client = Client(app)

        def ask(who: str, *, unfinished: bool = False):  # type: ignore[no-untyped-def]
            headers = {"content-encoding": "gzip", "authorization": f"Bearer {who}"}
            return client.begin("POST", PATH, [encoded], headers, unfinished=unfinished)

        held = ask("acme", unfinished=True)
        await eventually(lambda: app.services.requests.body_bytes == len(BODY), "what it decodes to is counted")
        refused = await ask("acme").done()
        assert (refused.status, "max_tenant_inflight_body_bytes" in refused.error["message"]) == (429, True)
        served = ask("rival")
        queue.answer(await queue.job(), b"1")
        assert (await served.done()).status == 200
        client.gone.set()
        await held.done()


async def test_an_encoded_upload_is_decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """[B7] The form of an upload may be encoded, too: the file is what the form holds."""
    monkeypatch.setenv("INFERQ_STORAGE_URL", str(tmp_path / "store"))
    form = (
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\nhello\r\n--B--\r\n'
    )
    headers = {"content-encoding": "gzip", "content-type": "multipart/form-data; boundary=B"}
    async with router() as app:
        answer = await Client(app).request("POST", "/v1/files", gzip.compress(form), headers)
    assert (answer.status, answer.json()["bytes"]) == (200, 5)

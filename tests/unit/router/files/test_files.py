"""Files as a Router takes them in and gives them out, the store in a folder: what goes wrong leaves nothing."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from queue_schemas import StoreUnavailable, Tenant
from router import RouterApp
from router.files.uploads import PIECE_BYTES
from storage import BatchProgress, BatchRequest, BatchStatus, FileStore, new_batch_id, writing
from storage.objects import MARK
from tests.support.waiting import eventually
from tests.unit.router.fakes import Answer, Client, FakeQueue, router

KEYS = {name: f"sk-{name}" for name in ("acme", "rival")}
GIVEN = ",".join(f"{hashlib.sha256(key.encode()).hexdigest()}:{name}" for name, key in KEYS.items())
FILES = "/v1/files"
FORM = "multipart/form-data; boundary=B"
PURPOSE = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
END = b"--B--\r\n"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the store of this test's Routers is."""
    monkeypatch.setenv("INFERQ_STORAGE_URL", str(tmp_path / "store"))
    return tmp_path / "store"


def file_part(data: bytes, name: bytes = b"a.jsonl") -> bytes:
    return b'--B\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n' % (name, data)


def sent_by(who: str = "acme", **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[who]}", "content-type": FORM} | more


def begin(
    app: RouterApp, pieces: Iterable[bytes], who: str = "acme", *, unfinished: bool = False, **more: str
) -> Answer:
    """An upload under way."""
    return Client(app).begin("POST", FILES, pieces, sent_by(who, **more), unfinished=unfinished)


async def upload(app: RouterApp, data: bytes = b"hello", who: str = "acme") -> dict[str, Any]:
    """A file that is there."""
    answer = await begin(app, [PURPOSE + file_part(data) + END], who).done()
    assert answer.status == 200, answer.body
    shown: dict[str, Any] = answer.json()
    return shown


async def ask(app: RouterApp, method: str, path: str, who: str = "acme", **more: str) -> Answer:
    return await Client(app).request(method, FILES + path, headers=sent_by(who) | more)


def lying(folder: Path) -> list[str]:
    """Every file below the store's folder."""
    found = (Path(root, name) for root, _, names in os.walk(folder) for name in names)  # which may be going meanwhile
    return [str(path.relative_to(folder)) for path in found if path.name != MARK]


async def test_an_uploaded_file_can_be_downloaded(folder: Path) -> None:
    """Whatever pieces it comes in, it is stored, shown and given back as it was; deleted, it is gone."""
    data = os.urandom(2 * PIECE_BYTES + 17)
    body = file_part(data) + PURPOSE + END
    pieces = [body[at : at + 60_000] for at in range(0, len(body), 60_000)]
    async with router(api_keys=GIVEN) as app:
        answer = await begin(app, pieces).done()
        shown = answer.json()
        assert (answer.status, shown["bytes"], shown["filename"]) == (200, len(data), "a.jsonl")
        assert shown["expires_at"] - shown["created_at"] == 2_592_000
        record = app.services.store.files.get(Tenant("acme"), shown["id"], 0)
        assert record is not None and record.sha256 == hashlib.sha256(data).hexdigest()
        assert (await ask(app, "GET", f"/{shown['id']}")).json() == shown
        content = await ask(app, "GET", f"/{shown['id']}/content")
        assert content.body == data
        assert content.headers["content-disposition"] == 'attachment; filename="a.jsonl"'
        assert "inferq_file_bytes_total" in (await Client(app).request("GET", "/metrics")).body.decode()
        assert (await ask(app, "DELETE", f"/{shown['id']}")).json() == {
            "id": shown["id"], "object": "file", "deleted": True,
        }  # fmt: skip
        assert (await ask(app, "GET", f"/{shown['id']}")).status == 404
        assert lying(folder) == []


async def test_one_idempotency_key_makes_one_file(folder: Path) -> None:
    """[D1] The same file under the same key is there once; another one gets 422, and leaves nothing."""
    once = {"idempotency-key": "upload-1"}

    async def sent(data: bytes, who: str = "acme", name: bytes = b"a.jsonl") -> Answer:
        return await begin(app, [PURPOSE + file_part(data, name) + END], who, **once).done()

    async with router(api_keys=GIVEN) as app:
        first, again = await sent(b"hello"), await sent(b"hello")
        assert (first.status, again.json()) == (200, first.json())
        for other in (await sent(b"hellO"), await sent(b"hello", name=b"b.jsonl")):
            assert (other.status, other.error["code"]) == (422, "idempotency_key_reused")
        assert (await sent(b"other", "rival")).status == 200
        await eventually(lambda: sum(name.endswith("part-000000") for name in lying(folder)) == 2, "no part is left")
        assert len((await ask(app, "GET", "")).json()["data"]) == 1
        await ask(app, "DELETE", f"/{first.json()['id']}")
        assert (await sent(b"hello")).json()["id"] != first.json()["id"]


async def test_ranges_and_conditional_requests_are_answered() -> None:
    """A range, a head, a tag it has, a range of another file's, one behind the end."""
    async with router(api_keys=GIVEN) as app:
        path = f"/{(await upload(app, b'0123456789'))['id']}/content"
        part = await ask(app, "GET", path, range="bytes=2-4")
        assert (part.status, part.body, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
        head = await ask(app, "HEAD", path)
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "10")
        tag = head.headers["etag"]
        assert (await ask(app, "GET", path, **{"if-none-match": tag})).status == 304
        assert (await ask(app, "GET", path, range="bytes=2-4", **{"if-range": tag})).status == 206
        assert (await ask(app, "GET", path, range="bytes=2-4", **{"if-range": '"other"'})).body == b"0123456789"
        beyond = await ask(app, "GET", path, range="bytes=10-")
        assert (beyond.status, beyond.error["code"]) == (416, "range_not_satisfiable")
        assert beyond.headers["content-range"] == "bytes */10"
        empty = f"/{(await upload(app, b''))['id']}/content"
        assert (await ask(app, "GET", empty)).body == b""


async def test_tenants_do_not_see_each_other() -> None:
    """List, retrieve, content and delete know the files of who asks, and of nobody else."""
    async with router(api_keys=GIVEN) as app:
        mine = await upload(app)
        for method, path in (("GET", ""), ("GET", "/content"), ("HEAD", "/content"), ("DELETE", "")):
            answer = await ask(app, method, f"/{mine['id']}{path}", "rival")
            assert answer.status == 404
        assert (await ask(app, "GET", "", "rival")).json()["data"] == []
        assert [file["id"] for file in (await ask(app, "GET", "")).json()["data"]] == [mine["id"]]
        for method, path in (("GET", ""), ("POST", ""), ("GET", f"/{mine['id']}"), ("DELETE", f"/{mine['id']}")):
            answer = await Client(app).request(method, FILES + path)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


async def test_files_are_listed_in_pages() -> None:
    """Newest first, behind an id, by purpose; what is no page is an error."""
    async with router(api_keys=GIVEN) as app:
        ids = [(await upload(app))["id"] for _ in range(3)]
        ids.sort()
        page = (await ask(app, "GET", "?limit=2")).json()
        assert [file["id"] for file in page["data"]] == ids[:0:-1]
        assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[2], ids[1], True)
        page = (await ask(app, "GET", f"?limit=2&after={page['last_id']}")).json()
        assert ([file["id"] for file in page["data"]], page["has_more"]) == ([ids[0]], False)
        assert (await ask(app, "GET", "?order=asc&limit=1")).json()["first_id"] == ids[0]
        nothing = (await ask(app, "GET", "?purpose=vision")).json()
        assert (nothing["data"], nothing["first_id"], nothing["has_more"]) == ([], None, False)
        for wrong in ("limit=0", "limit=10001", "order=up", "after=x", f"after={ids[0]}%00"):
            assert (await ask(app, "GET", f"?{wrong}")).status == 400, wrong


@pytest.mark.parametrize(
    ("pieces", "more", "status", "words"),
    [
        ([PURPOSE + file_part(b"x" * 90)], {}, 400, "last boundary"),
        ([PURPOSE, file_part(b"1"), file_part(b"2"), END], {}, 400, "two files"),
        ([file_part(b"x" * PIECE_BYTES), END], {}, 400, "purpose is missing"),
        ([PURPOSE + file_part(b"x" * 1_100_000) + END], {}, 413, "more than 1000000 bytes"),
        ([PURPOSE], {"content-length": "1200000"}, 413, "more than"),
        ([PURPOSE + END + b"x" * 1_200_000], {}, 413, "more than"),
        ([b"{}"], {"content-type": "application/json"}, 400, "multipart/form-data"),
        ([b"{}"], {"content-type": "multipart/form-data"}, 400, "boundary"),
        ([PURPOSE], {"content-length": "x"}, 400, "content-length"),
    ],
)
async def test_a_refused_upload_leaves_nothing(
    folder: Path, pieces: list[bytes], more: dict[str, str], status: int, words: str
) -> None:
    """Each fault has its error, and no part of the file stays."""
    async with router(api_keys=GIVEN, max_file_bytes=1_000_000) as app:
        answer = await begin(app, pieces, **more).done()
        assert (answer.status, answer.complete) == (status, True)
        assert words in answer.error["message"]
        await eventually(lambda: not lying(folder) and not app.services.store.open, "nothing is left")
        assert app.services.transfers.open == 0


async def test_a_cut_short_upload_leaves_nothing(folder: Path) -> None:
    """A client that goes away: what came is removed."""
    async with router(api_keys=GIVEN) as app:
        half = [PURPOSE + file_part(b"x" * 2 * PIECE_BYTES)[:-2]]
        gone = begin(app, half, unfinished=True)
        await eventually(lambda: lying(folder), "some of it is being written")
        gone.client.gone.set()
        await gone.done()
        await eventually(lambda: not lying(folder) and not app.services.store.open, "nothing is left")


async def test_a_full_disk_is_reported_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """507, with the object's part removed; files that are there are still given out."""
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        if len(data) > 1_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    async with router(api_keys=GIVEN) as app:
        there = await upload(app)
        before = lying(folder)
        monkeypatch.setattr(writing.os, "write", write)
        answer = await begin(app, [PURPOSE + file_part(b"x" * 2_000) + END]).done()
        assert (answer.status, answer.error["code"]) == (507, "store_full")
        await eventually(lambda: lying(folder) == before, "nothing is left")
        assert (await ask(app, "GET", f"/{there['id']}/content")).body == b"hello"


async def test_a_record_that_cannot_be_written_takes_the_part_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part is in the store already: it goes again."""

    def add(files: FileStore, record: Any) -> None:
        raise StoreUnavailable("as ordered")

    monkeypatch.setattr(FileStore, "add", add)
    async with router(api_keys=GIVEN) as app:
        answer = await begin(app, [PURPOSE + file_part(b"1") + END]).done()
        assert answer.status == 503
        await eventually(lambda: not lying(folder), "nothing is left")


async def test_a_hanging_store_stops_files_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads, lists and contents answer 503 within their limit; inference is served meanwhile; nothing half stays."""
    hang, queue = threading.Event(), FakeQueue("m")
    really = FileStore.add

    def add(files: FileStore, record: Any) -> None:
        hang.wait(20)
        really(files, record)

    async with router(queue, api_keys=GIVEN, store_timeout_ms=100, store_threads=2) as app:
        monkeypatch.setattr(FileStore, "add", add)
        answers = await asyncio.gather(*(begin(app, [PURPOSE + file_part(b"1") + END]).done() for _ in range(3)))
        assert {(answer.status, answer.error["code"]) for answer in answers} == {(503, "store_unavailable")}
        assert (await ask(app, "GET", "")).status == 503
        asked = Client(app).post({"model": "m"}, headers=sent_by() | {"content-type": "application/json"})
        queue.answer(await queue.job(), b"{}")
        assert (await asked.done()).status == 200
        hang.set()
        await eventually(lambda: not app.services.store.open, "everything has ended")
        assert (await ask(app, "GET", "")).json()["data"] == []


async def test_an_unusable_store_is_reported(folder: Path) -> None:
    """Where a file stands in the folder's place the Router runs, and says 503 with the reason."""
    folder.write_text("in the way")  # noqa: ASYNC240 - before the Router is there
    async with router(api_keys=GIVEN) as app:
        answer = await begin(app, [PURPOSE + file_part(b"1") + END]).done()
        assert (answer.status, answer.error["code"]) == (503, "store_unavailable")
        assert (await ask(app, "GET", "")).json()["data"] == []


async def test_a_tenant_stores_at_most_its_quota(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its files or bytes an upload is refused, announced or not; what was deleted makes room; others are free."""
    monkeypatch.setattr("router.files.quota._MEASURE_AGAIN_AFTER_S", 0)
    async with router(api_keys=GIVEN, max_tenant_files=2, max_tenant_file_bytes=400_000) as app:
        first = await upload(app)
        for size in (399_999, 600_000):
            too_much = await begin(app, [PURPOSE + file_part(b"x" * size) + END]).done()
            assert (too_much.status, too_much.error["code"]) == (403, "permission_denied")
        announced = await begin(app, [PURPOSE], **{"content-length": "600000"}).done()
        assert "delete some" in announced.error["message"]
        await upload(app)
        refused = await begin(app, [PURPOSE + file_part(b"1") + END]).done()
        assert (refused.status, "may have 2" in refused.error["message"]) == (403, True)
        await upload(app, who="rival")
        assert (await ask(app, "DELETE", f"/{first['id']}")).status == 200
        await upload(app)
        app.services.store.files.delete(app.services.store.files.page(Tenant("acme"), 0)[0][0])
        await upload(app)


async def test_concurrent_transfers_are_limited() -> None:
    """Uploads beyond the bound get 429; when one ends there is room."""
    async with router(api_keys=GIVEN, max_concurrent_transfers=1) as app:
        first = begin(app, [PURPOSE], unfinished=True)
        await eventually(lambda: app.services.transfers.open == 1, "one is under way")
        second = await begin(app, [PURPOSE + file_part(b"1") + END]).done()
        assert (second.status, second.error["code"]) == (429, "over_capacity")
        first.client.gone.set()
        await first.done()
        await upload(app)


async def test_the_input_of_a_live_batch_cannot_be_deleted() -> None:
    """409 with the batch's id until it has ended; batches of others do not count."""
    async with router(api_keys=GIVEN) as app:
        file_id, batches = (await upload(app))["id"], app.services.store.batches
        now_s = int(time.time())
        for tenant in ("rival", "acme"):
            request = BatchRequest(
                id=new_batch_id(now_s * 1000), tenant=tenant, input_file_id=file_id, endpoint="/v1/embeddings",
                completion_window="24h", created_at=now_s, expires_at=now_s + 9,
            )  # fmt: skip
            batches.create(request)
        refused = await ask(app, "DELETE", f"/{file_id}")
        assert (refused.status, refused.error["code"]) == (409, "conflict")
        assert request.id in refused.error["message"]
        batches.set_progress(Tenant("acme"), request.id, BatchProgress(status=BatchStatus.COMPLETED))
        assert (await ask(app, "DELETE", f"/{file_id}")).status == 200


async def test_a_download_ends_when_its_client_disconnects() -> None:
    """A client that leaves takes nothing of the Router with it."""
    async with router(api_keys=GIVEN) as app:
        path = f"{FILES}/{(await upload(app, b'x' * 3_000_000))['id']}/content"
        client = Client(app)
        client.reading.clear()
        answer = client.begin("GET", path, headers=sent_by())
        await eventually(lambda: app.services.transfers.open == 1, "it is under way")
        client.gone.set()
        await asyncio.sleep(0)
        client.reading.set()
        await answer.done()
        assert len(answer.body) < 3_000_000
        assert app.services.transfers.open == 0


async def test_shutdown_lets_uploads_finish() -> None:
    """They count as open requests: new ones are sent elsewhere, what is under way has the same time to end."""
    async with router(api_keys=GIVEN, shutdown_timeout_ms=5_000) as app:
        client = Client(app)
        open_one = client.begin("POST", FILES, [PURPOSE], sent_by(), unfinished=True)
        await eventually(lambda: app.services.transfers.open == 1, "it is under way")
        ending = asyncio.ensure_future(app.drain())
        await asyncio.sleep(0)
        refused = await begin(app, [PURPOSE + file_part(b"1") + END]).done()
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert not ending.done()
        client.gone.set()
        await open_one.done()
        await asyncio.wait_for(ending, 2)

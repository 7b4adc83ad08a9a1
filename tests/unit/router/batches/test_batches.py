"""Batches as a Router takes them in and shows them, the file store below in a folder; nothing runs them here."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import openai.types
import orjson
import pytest

from openai_api.batch_windows import window_seconds
from queue_schemas import BadRequest, Tenant
from router import RouterApp, RouterSettings
from router.batches.rules import batch_endpoints, read_batch
from storage import ENDED_STATUSES, BatchError, BatchProgress, BatchStatus, FileRecord, new_file_id
from tests.unit.router.fakes import Answer, Client, FakeQueue, router

ACME, RIVAL = Tenant("acme"), Tenant("rival")
NOW = 1_790_000_000
LIMIT_BYTES, LIVE = 10_000, 3
EXPIRY = "output_expires_after.seconds"


@pytest.fixture
async def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RouterApp]:
    """A Router with two tenants and small limits."""
    monkeypatch.setenv("INFERQ_STORAGE_URL", str(tmp_path / "store"))
    monkeypatch.setenv("INFERQ_STORAGE_MAX_BATCH_INPUT_BYTES", str(LIMIT_BYTES))
    keys = ",".join(f"{hashlib.sha256(name.encode()).hexdigest()}:{name}" for name in (ACME, RIVAL))
    settings = {
        "api_keys": keys,
        "max_tenant_batches": LIVE,
        "batch_windows": ["24h", "7d"],
    }
    async with router(FakeQueue("m"), **settings) as app:
        yield app


def upload(app: RouterApp, tenant: Tenant = ACME, *, purpose: str = "batch", size: int = 100) -> str:
    """A file's record: nobody here looks at its bytes."""
    record = FileRecord(
        id=new_file_id(NOW * 1000), tenant=tenant, filename="in.jsonl", purpose=purpose, created_at=NOW, bytes=size
    )
    app.services.store.files.add(record)
    return record.id


async def ask(
    app: RouterApp, method: str, path: str, body: Any = None, *, key: str = ACME, headers: Mapping[str, str] = {}
) -> Answer:
    data = b"" if body is None else body if isinstance(body, bytes) else orjson.dumps(body)
    return await Client(app).request(method, path, data, {"authorization": f"Bearer {key}", **headers})


def asked(file_id: str, **fields: Any) -> dict[str, Any]:
    return {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h", **fields}


async def create(app: RouterApp, file_id: str, *, key: str = ACME, **fields: Any) -> dict[str, Any]:
    answer = await ask(app, "POST", "/v1/batches", asked(file_id, **fields), key=key)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


async def test_a_new_batch_parses_as_the_sdks_batch(app: RouterApp) -> None:
    """Every field that its type knows, none besides; validating, with the window counted from its creation."""
    metadata = {"run": "17"}
    expiry = {"anchor": "created_at", "seconds": 3600}
    batch = await create(app, upload(app), metadata=metadata, output_expires_after=expiry, completion_window="7d")
    typed = openai.types.Batch.model_validate(batch)
    assert batch.keys() == openai.types.Batch.model_fields.keys()
    assert (typed.status, typed.object, typed.metadata) == ("validating", "batch", metadata)
    assert typed.expires_at == typed.created_at + 7 * 86_400
    assert typed.request_counts is not None and typed.request_counts.total == 0
    stored = app.services.store.batches.get(ACME, typed.id)
    assert stored is not None and stored.request.output_expires_after is not None
    assert stored.request.output_expires_after.seconds == 3600
    assert (ACME, typed.id) in app.services.store.batches.live()


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input_file_id": None}, "input_file_id", "is missing"),
        ({"input_file_id": 7}, "input_file_id", "must be text, not a number"),
        ({"endpoint": "/v1/sleep"}, "endpoint", "choose /v1/chat/completions"),
        ({"endpoint": "/v1/audio/transcriptions"}, "endpoint", "cannot be used by a batch"),
        ({"endpoint": ""}, "endpoint", "must be text, not empty"),
        ({"completion_window": "1h"}, "completion_window", "choose 24h or 7d"),
        ({"completion_window": 24}, "completion_window", "must be text"),
        ({"metadata": ["x"]}, "metadata", "not an array"),
        ({"metadata": {"k": 1}}, "metadata.k", "must be text, not a number"),
        ({"metadata": {"k" * 65: ""}}, "metadata", "more than 64 characters"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "more than 512 characters"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "17 pairs: send 16 at most"),
        ({"output_expires_after": {"seconds": 3600}}, "output_expires_after.anchor", "is missing"),
        ({"output_expires_after": "1h"}, "output_expires_after", "must be an object, not text"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor", "created_at"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, EXPIRY, "at least 3600"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": True}}, EXPIRY, "whole"),
        ({"metdata": {}}, "metdata", "is no field here"),
    ],
)  # fmt: skip
def test_an_invalid_field_is_named(fields: dict[str, Any], param: str, words: str) -> None:
    """The field at fault, and a sentence."""
    settings = RouterSettings()
    with pytest.raises(BadRequest) as refused:
        read_batch(orjson.dumps(asked("file-1") | fields), batch_endpoints(settings.paths), ["24h", "7d"])
    assert refused.value.param == param
    assert words in refused.value.message


async def test_a_refused_batch_leaves_nothing(app: RouterApp) -> None:
    """Status 400 also for a body that is no object, and nothing is kept."""
    for body in (b"", b"{", b"[]", b"null", b"\xff", orjson.dumps(asked(upload(app), metadata={"k": 1}))):
        answer = await ask(app, "POST", "/v1/batches", body)
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert not app.services.store.batches.live()


async def test_unusable_input_files_are_refused_at_once(app: RouterApp) -> None:
    """Of another purpose, empty, too large, or none of the tenant's: another's file is none."""
    for file_id, words in (
        (upload(app, purpose="user_data"), "purpose 'user_data'"),
        (upload(app, size=0), "is empty"),
        (upload(app, size=LIMIT_BYTES + 1), "more than the 10000"),
        (upload(app, RIVAL), "no file "),
        ("file-" + "0" * 32, "no file "),
        ("file-../../../etc/passwd", "no file "),
    ):
        answer = await ask(app, "POST", "/v1/batches", asked(file_id))
        assert (answer.status, answer.error["param"]) == (400, "input_file_id")
        assert words in answer.error["message"]


async def test_live_batches_of_a_tenant_are_limited(app: RouterApp) -> None:
    """Beyond the limit 429 and when to come again; another tenant has its own; one that ended makes room."""
    file_id = upload(app)
    first, *_ = [await create(app, file_id) for _ in range(LIVE)]
    refused = await ask(app, "POST", "/v1/batches", asked(file_id))
    assert (refused.status, refused.error["code"]) == (429, "over_capacity")
    assert int(refused.headers["retry-after"]) > 0
    await create(app, upload(app, RIVAL), key=RIVAL)
    app.services.store.batches.unmark(ACME, first["id"])
    await create(app, file_id)


async def test_one_idempotency_key_makes_one_batch(app: RouterApp) -> None:
    """However often, and at how many at once, it is sent; with another request it is refused; a tenant has its own."""
    file_id, headers = upload(app), {"idempotency-key": "order-17"}
    answers = await asyncio.gather(
        *(ask(app, "POST", "/v1/batches", asked(file_id), headers=headers) for _ in range(5))
    )
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = await ask(app, "POST", "/v1/batches", asked(file_id, endpoint="/v1/completions"), headers=headers)
    assert (other.status, other.error["code"]) == (422, "idempotency_key_reused")
    rival = await ask(app, "POST", "/v1/batches", asked(upload(app, RIVAL)), key=RIVAL, headers=headers)
    assert rival.json()["id"] != answers[0].json()["id"]
    assert len(app.services.store.batches.live()) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"endpoint": "/v1/completions"},
        {"completion_window": "7d"},
        {"metadata": {"n": "2"}},
        {"output_expires_after": {"anchor": "created_at", "seconds": 3_600}},
        {},
    ],
    ids=["endpoint", "window", "metadata", "expiry", "file"],
)
async def test_another_request_under_the_key_of_a_batch_is_refused(app: RouterApp, other: dict[str, Any]) -> None:
    """[D1] Another file, endpoint, window, metadata or expiry: 422, and no second batch; the first request is a
    replay."""
    file_id, headers = upload(app), {"idempotency-key": "order-17"}
    first = await ask(app, "POST", "/v1/batches", asked(file_id), headers=headers)
    changed = asked(file_id, **other) if other else asked(upload(app))
    answer = await ask(app, "POST", "/v1/batches", changed, headers=headers)
    assert (answer.status, answer.error["code"]) == (422, "idempotency_key_reused")
    again = await ask(app, "POST", "/v1/batches", asked(file_id), headers=headers)
    assert (again.status, again.json()["id"]) == (200, first.json()["id"])
    assert len(app.services.store.batches.live()) == 1


async def test_a_refused_batch_leaves_its_key_free(app: RouterApp) -> None:
    """[D1] What was refused made nothing: the same key with a request that can be run is the first of its name."""
    headers = {"idempotency-key": "order-17"}
    missing = await ask(app, "POST", "/v1/batches", asked(new_file_id(NOW)), headers=headers)
    assert missing.status == 400
    assert (await ask(app, "POST", "/v1/batches", asked(upload(app)), headers=headers)).status == 200


async def test_one_key_sent_at_once_with_two_requests_makes_one_batch(app: RouterApp) -> None:
    """[D1] Of two different requests at the same moment one is carried out, and the other is refused."""
    headers = {"idempotency-key": "race"}
    files = [upload(app) for _ in range(6)]
    answers = await asyncio.gather(
        *(ask(app, "POST", "/v1/batches", asked(file_id), headers=headers) for file_id in files)
    )
    assert sorted(answer.status for answer in answers) == [200, 422, 422, 422, 422, 422]
    assert len(app.services.store.batches.live()) == 1


async def test_a_request_that_the_sdk_repeats_runs_once(app: RouterApp) -> None:
    """[D2] It sends no key with a repetition: one whose answer never reached its client is found. The count alone
    proves nothing: after an answer that was sent, the same request is a batch of its own, as is another one."""
    file_id, retried = upload(app), {"x-stainless-retry-count": "1"}
    client = Client(app)
    lost = client.post(asked(file_id), "/v1/batches", {"authorization": f"Bearer {ACME}"})
    client.gone.set()
    await lost.done()
    again = await ask(app, "POST", "/v1/batches", asked(file_id), headers=retried)
    assert again.json()["id"] == lost.json()["id"]
    other = await ask(app, "POST", "/v1/batches", asked(file_id, metadata={"n": "2"}), headers=retried)
    assert other.json()["id"] != again.json()["id"]
    await app.services.store.close(1.0)
    anew = await ask(app, "POST", "/v1/batches", asked(file_id), headers=retried)
    assert anew.json()["id"] not in {again.json()["id"], other.json()["id"]}


async def test_progress_is_shown(app: RouterApp) -> None:
    """Stamps, counts, errors with lines, files and usage as the batcher wrote them, in the SDK's types."""
    batch_id = (await create(app, upload(app)))["id"]
    progress = BatchProgress(
        status=BatchStatus.COMPLETED,
        model="m",
        total=3,
        completed=2,
        failed=1,
        stamps={"in_progress_at": NOW + 1, "finalizing_at": NOW + 2, "completed_at": NOW + 3},
        errors=(BatchError(code="invalid_json", message="line 2 is not JSON", line=2),),
        output_file_id="file-1",
        error_file_id="file-2",
        usage={"input_tokens": 5, "output_tokens": 7, "total_tokens": 12},
    )
    app.services.store.batches.set_progress(ACME, batch_id, progress)
    batch = openai.types.Batch.model_validate((await ask(app, "GET", f"/v1/batches/{batch_id}")).json())
    assert (batch.status, batch.model, batch.completed_at, batch.failed_at) == ("completed", "m", NOW + 3, None)
    assert batch.request_counts is not None and batch.request_counts.failed == 1
    assert batch.errors is not None and batch.errors.data is not None and batch.errors.data[0].line == 2
    assert batch.usage is not None and batch.usage.total_tokens == 12
    assert (batch.output_file_id, batch.error_file_id) == ("file-1", "file-2")


async def test_a_cancel_shows_before_the_batcher_has_noticed(app: RouterApp) -> None:
    """Cancelling from the first call on, however often it is asked; its stamp stays that of the first."""
    batch_id = (await create(app, upload(app)))["id"]
    path = f"/v1/batches/{batch_id}/cancel"
    first = (await ask(app, "POST", path)).json()
    assert first["status"] == "cancelling"
    assert first["cancelling_at"] >= first["created_at"]
    assert (await ask(app, "POST", path)).json() == first
    ended = BatchProgress(status=BatchStatus.CANCELLED, stamps={"cancelled_at": NOW + 9})
    app.services.store.batches.set_progress(ACME, batch_id, ended)
    shown = (await ask(app, "GET", f"/v1/batches/{batch_id}")).json()
    assert (shown["status"], shown["cancelled_at"]) == ("cancelled", NOW + 9)
    assert shown["cancelling_at"] == first["cancelling_at"]


async def test_an_ended_batch_cannot_be_cancelled(app: RouterApp) -> None:
    """409, and the word to the SDK not to try again, which it otherwise does with every 409."""
    batch_id = (await create(app, upload(app)))["id"]
    for status in ENDED_STATUSES:
        app.services.store.batches.set_progress(ACME, batch_id, BatchProgress(status=status))
        answer = await ask(app, "POST", f"/v1/batches/{batch_id}/cancel")
        assert (answer.status, answer.error["code"]) == (409, "conflict")
        assert answer.headers["x-should-retry"] == "false"
        assert (await ask(app, "GET", f"/v1/batches/{batch_id}")).json()["status"] == status


async def test_batches_are_listed_newest_first(app: RouterApp) -> None:
    """Each once, by `after`; the last page says that it is."""
    file_id = upload(app)
    ids = [(await create(app, file_id))["id"] for _ in range(3)]
    first = (await ask(app, "GET", "/v1/batches?limit=2")).json()
    seen = [batch["id"] for batch in first["data"]]
    assert (first["object"], first["has_more"], first["last_id"]) == ("list", True, seen[-1])
    rest = (await ask(app, "GET", f"/v1/batches?limit=2&after={first['last_id']}")).json()
    assert sorted(seen + [batch["id"] for batch in rest["data"]]) == sorted(ids)
    assert not rest["has_more"]
    nothing = (await ask(app, "GET", "/v1/batches", key=RIVAL)).json()
    assert (nothing["data"], nothing["first_id"], nothing["has_more"]) == ([], None, False)


async def test_invalid_cursors_and_limits_are_refused(app: RouterApp) -> None:
    """With the parameter at fault."""
    for query in ("limit=0", "limit=101", "limit=x", "after=batch_1", "after=../../x"):
        answer = await ask(app, "GET", f"/v1/batches?{query}")
        assert (answer.status, answer.error["param"]) == (400, query.partition("=")[0])


async def test_another_tenants_batch_is_not_found(app: RouterApp) -> None:
    """The same 404, whether it exists for another tenant or for nobody."""
    theirs = (await create(app, upload(app, RIVAL), key=RIVAL))["id"]
    for batch_id in (theirs, "batch_" + "0" * 32, "batch_x", "..%2f..%2fx"):
        for method, action in (("GET", ""), ("POST", "/cancel")):
            answer = await ask(app, method, f"/v1/batches/{batch_id}{action}")
            assert (answer.status, answer.error["code"]) == (404, "not_found")
            assert answer.error["message"] == f"no batch {batch_id!r} found for this API key"
    found = app.services.store.batches.get(RIVAL, theirs)
    assert found is not None and found.cancel_asked_at is None


async def test_without_an_api_key_nothing_is_shown(app: RouterApp) -> None:
    """401 on every path."""
    for method, path in (("POST", ""), ("GET", ""), ("GET", "/batch_1"), ("POST", "/batch_1/cancel")):
        assert (await Client(app).request(method, f"/v1/batches{path}")).status == 401


def test_completion_windows_have_limits() -> None:
    """An invalid window is reported when the setting is read."""
    assert [window_seconds(text) for text in ("30m", "24h", "30d")] == [1_800, 86_400, 2_592_000]
    for wrong in ("31d", "0h", "24", "h", "1w", "-1h", "99999d"):
        with pytest.raises(ValueError, match="completion window"):
            window_seconds(wrong)
    with pytest.raises(ValueError, match="completion window"):
        RouterSettings(batch_windows=["soon"])


def test_a_batch_may_use_every_json_endpoint() -> None:
    """The paths built in but forms, and those that a setting adds."""
    found = batch_endpoints(RouterSettings(extra_paths=["/v1/classify"]).paths)
    assert found[:3] == ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
    assert "/v1/classify" in found
    assert "/v1/audio/transcriptions" not in found

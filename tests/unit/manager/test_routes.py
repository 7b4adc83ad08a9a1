import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from manager import ManagerService, create_app
from queue_schemas import Lane, LaneDepth, Pool, SessionId
from tests.support.waiting import eventually
from tests.unit.manager.fakes import FakeProbe, FakeQueue, fast_settings

ONE = SessionId("w.0000000000000001")
TOKEN = {"x-inferq-join-token": "t0ken"}
REGISTRATION = {"worker_id": "w", "session_id": ONE, "models": ["org/m"], "slots": 2, "engine": "ready"}


@pytest.fixture
async def queue() -> FakeQueue:
    return FakeQueue(numbers={ONE: 1}, waiting={Pool("org/m"): {Lane.BATCH: LaneDepth(waiting=5)}})


@pytest.fixture
async def client(queue: FakeQueue) -> AsyncIterator[httpx.AsyncClient]:
    settings = fast_settings(join_token="t0ken", lease_ms=60_000, leader_lease_ms=5_000)
    service = ManagerService(settings, queue.open, FakeProbe(), broker_url="redis://:pw@here")
    stop = asyncio.Event()
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(service.run(stop))
        await eventually(lambda: service.acting, "the Manager acts")
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://manager", headers=TOKEN) as client:
            yield client
        stop.set()


async def test_the_life_of_a_worker(client: httpx.AsyncClient) -> None:
    """Register, heartbeat, list, drain, deregister, each with its status."""
    joined = await client.post("/fabric/v1/workers", json=REGISTRATION)
    assert joined.status_code == 200
    assert joined.json()["broker_url"] == "redis://:pw@here"
    assert joined.json()["assignment"]["pools"][0]["pool"] == "org/m"
    heartbeat = {key: value for key, value in REGISTRATION.items() if key != "worker_id"}
    assert (await client.post("/fabric/v1/workers/w/heartbeat", json=heartbeat)).json()["drain"] is False
    listed = (await client.get("/fabric/v1/workers")).json()
    assert [worker["worker_id"] for worker in listed["workers"]] == ["w"]
    assert listed["term"] == 1
    assert (await client.post("/fabric/v1/workers/w/drain")).status_code == 202
    assert (await client.delete("/fabric/v1/workers/w", params={"session_id": ONE})).status_code == 204
    gone = await client.post("/fabric/v1/workers/w/heartbeat", json=heartbeat)
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "unknown_worker")


async def test_one_autoscaler_claims_a_pool(client: httpx.AsyncClient) -> None:
    """The other is told that it does not act; a claim declares the pool. What is no claim is refused."""
    claim = {"pool": "org/new", "autoscaler_id": "auto.0000000000000001", "ttl_ms": 5_000}
    assert (await client.post("/fabric/v1/autoscalers", json=claim)).json() == {"acting": True}
    other = claim | {"autoscaler_id": "auto.0000000000000002"}
    assert (await client.post("/fabric/v1/autoscalers", json=other)).json() == {"acting": False}
    assert (await client.get("/fabric/v1/pools/org/new")).json()["workers"] == 0
    for wrong in ({"ttl_ms": -1}, {"ttl_ms": 2**60}, {"autoscaler_id": "x y"}, {"pool": ""}):
        assert (await client.post("/fabric/v1/autoscalers", json=claim | wrong)).status_code == 400


async def test_a_live_id_is_409(client: httpx.AsyncClient, queue: FakeQueue) -> None:
    """A second session id of an id whose worker answers pings gets worker_id_taken."""
    queue.answers_pings.add(ONE)
    await client.post("/fabric/v1/workers", json=REGISTRATION)
    other = await client.post("/fabric/v1/workers", json=REGISTRATION | {"session_id": "w.0000000000000002"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "worker_id_taken")


@pytest.mark.parametrize("token", [{}, {"x-inferq-join-token": "wrong"}])
async def test_without_the_join_token_nothing_of_the_fleet_is_shown(
    client: httpx.AsyncClient, token: dict[str, str]
) -> None:
    """Every path of workers, broker and pools wants the token; health is open."""
    client.headers.pop("x-inferq-join-token")
    for method, path in (
        ("POST", "/fabric/v1/workers"),
        ("GET", "/fabric/v1/workers"),
        ("POST", "/fabric/v1/workers/w/heartbeat"),
        ("POST", "/fabric/v1/workers/w/drain"),
        ("DELETE", f"/fabric/v1/workers/w?session_id={ONE}"),
        ("GET", "/fabric/v1/broker"),
        ("POST", "/fabric/v1/autoscalers"),
        ("GET", "/fabric/v1/pools"),
        ("GET", "/fabric/v1/pools/org/m"),
    ):
        answer = await client.request(method, path, json=REGISTRATION, headers=token)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
    assert (await client.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"worker_id": "../etc"},
        {"worker_id": ""},
        {"session_id": "nonsense"},
        {"models": ["m"] * 2000},
        {"models": "m"},
        {"slots": -1},
        {"slots": 10**9},
        {"engine": "sleepy"},
    ],
)
async def test_a_wrong_registration_is_400(client: httpx.AsyncClient, change: dict[str, object]) -> None:
    """Each field is checked, and the answer names it."""
    answer = await client.post("/fabric/v1/workers", json=REGISTRATION | change)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(next(iter(change)))


async def test_an_unknown_field_is_ignored(client: httpx.AsyncClient) -> None:
    """A newer worker may say more."""
    answer = await client.post("/fabric/v1/workers", json=REGISTRATION | {"gpu": "H100"})
    assert answer.status_code == 200


async def test_a_large_body_is_413(client: httpx.AsyncClient) -> None:
    """Bodies over a megabyte are refused, whether they say their length or not."""

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    for content in (b" " * 2_000_000, endless()):
        answer = await client.post("/fabric/v1/workers", content=content)
        assert answer.status_code == 413, answer.text
        assert answer.json()["error"]["code"] == "request_too_large"


async def test_the_broker_address(client: httpx.AsyncClient) -> None:
    """A Router that knows only the Manager asks it where the queue is."""
    assert (await client.get("/fabric/v1/broker")).json() == {"broker_url": "redis://:pw@here", "shards": 2}


async def test_pools_by_name_with_a_slash(client: httpx.AsyncClient) -> None:
    """A model id with a slash is one path; a model nobody knows is 404."""
    pool = (await client.get("/fabric/v1/pools/org/m")).json()
    assert (pool["model"], pool["waiting"], pool["lanes"]["batch"]["waiting"]) == ("org/m", 5, 5)
    assert [entry["model"] for entry in (await client.get("/fabric/v1/pools")).json()["pools"]] == ["org/m"]
    missing = await client.get("/fabric/v1/pools/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_ready_follows_redis(client: httpx.AsyncClient, queue: FakeQueue) -> None:
    """Ready while it acts; 503 with the reason, and a Retry-After, when Redis is away."""
    assert (await client.get("/readyz")).status_code == 200
    queue.down = True

    async def refusal(method: str, path: str) -> httpx.Response | None:
        answer = await client.request(method, path, json=REGISTRATION)
        return answer if answer.status_code != 200 else None

    ready = await eventually(lambda: refusal("GET", "/readyz"), "not ready")
    assert ready is not None and "Redis is away" in ready.json()["reasons"][0]
    answer = await eventually(lambda: refusal("POST", "/fabric/v1/workers"), "joins are refused")
    assert answer is not None
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1


async def test_metrics_show_the_fleet_and_the_queues(client: httpx.AsyncClient, queue: FakeQueue) -> None:
    """The state of the pools is in the metrics, and vanishes rather than goes stale when Redis is away."""
    await client.post("/fabric/v1/workers", json=REGISTRATION)
    queue.counts.events[Pool("org/m"), Lane.BATCH, "expired"] = 3
    queue.counts.stopped[Pool("org/m"), Lane.BATCH, "expired/waiting"] = 2
    text = (await client.get("/metrics")).text
    for line in (
        'inferq_workers{model="org/m",state="active"} 1.0',
        'inferq_pool_workers{model="org/m"} 1.0',
        'inferq_jobs{lane="batch",model="org/m",state="waiting"} 5.0',
        'inferq_job_events_total{event="expired",lane="batch",model="org/m"} 3.0',
        'inferq_jobs_stopped_total{cause="waiting",lane="batch",model="org/m",state="expired"} 2.0',
        "inferq_manager_acting 1.0",
        'inferq_redis_round_trips_total{role="manager"}',
    ):
        assert line in text
    queue.down = True
    text = (await client.get("/metrics")).text
    assert "inferq_jobs{" not in text
    assert "inferq_jobs_stopped_total{" not in text


ODD_FIELDS: list[dict[str, object]] = [
    {"url": "file:///etc/passwd"}, {"url": "gopher://127.0.0.1:70/"}, {"url": "http://user:secret@h:1"},
    {"url": "http://h:1/?x="}, {"url": "http://h:1/#"}, {"url": "http://h:1\r\nx: y"}, {"url": "http://h\\@other:1"},
    {"url": "http://h:99999"}, {"url": "http://[::1"}, {"url": "http://h:0"}, {"url": "http://"}, {"url": "//h:1"},
    {"url": "http://h:1/" + "a" * 3_000}, {"url": 5}, {"url": "http://hö:1"}, {"url": ""},
    {"worker_id": "w\x1b[2J"}, {"worker_id": "w" * 64}, {"worker_id": "../w"}, {"worker_id": None},
    {"session_id": "w"}, {"session_id": "w.0000000000000001\n"}, {"session_id": ["w"]},
    {"models": ["m\n"]}, {"models": ["m" * 300]}, {"models": [str(n) for n in range(2_000)]}, {"models": "m"},
    {"slots": -1}, {"slots": 1e400}, {"slots": "many"}, {"slots": 10**30}, {"running": -1}, {"engine": "warp"},
    {"engine_detail": "x" * 5_000}, {"version": "x" * 5_000}, {"region": "\x00"}, {"draining": "perhaps"},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_FIELDS, ids=lambda odd: ascii(odd)[:40])
async def test_an_odd_registration_is_refused_by_field(client: httpx.AsyncClient, odd: dict[str, object]) -> None:
    """URLs that the Manager should not ask, names that are none, numbers and lists out of bounds: 400 that names it,
    and nobody joins."""
    body = json.dumps(REGISTRATION | odd)
    answer = await client.post("/fabric/v1/workers", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].partition(".")[0] == next(iter(odd))
    assert len(answer.text) < 1_000
    assert "secret" not in answer.text
    assert (await client.get("/fabric/v1/workers")).json()["workers"] == []


@pytest.mark.parametrize(
    "body",
    [b"", b"[", b"null", b"[]", b"\xff", b"{" * 100_000, b"[" * 100_000, b"9" * 10_000, b'{"a":' * 100_000, b"NaN",
     b'"\\ud800"', b'{"worker_id":"\\ud800","session_id":"w","slots":1}', "{}".encode("utf-16"), b"\x00" * 100_000],
)  # fmt: skip
async def test_what_is_no_registration_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    """Bytes that are no JSON object, or too deep a one, are a 400 of a few words."""
    for path in ("/fabric/v1/workers", "/fabric/v1/workers/w/heartbeat"):
        answer = await client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert len(answer.text) < 1_000


async def test_a_body_said_to_be_endless_is_refused_unread(client: httpx.AsyncClient) -> None:
    """A length of thousands of digits is too large, not a fault of ours."""
    answer = await client.post("/fabric/v1/workers", content=b"{}", headers={"content-length": "9" * 5_000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


async def test_the_openapi_document_is_true(client: httpx.AsyncClient) -> None:
    """It lists the paths, and the error object instead of FastAPI's own 422."""
    document = (await client.get("/openapi.json")).json()
    register = document["paths"]["/fabric/v1/workers"]["post"]
    assert "422" not in register["responses"]
    assert register["responses"]["409"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorAnswer")
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert "/fabric/v1/pools/{model}" in document["paths"]

"""What the Router answers beside inference, and what it answers to nobody."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from broker import BrokerSettings
from queue_schemas import (
    BrokerAddress,
    BrokerUnavailable,
    BrokerUnsuitable,
    CannotStart,
    InferqError,
    ManagerUnavailable,
)
from router import RouterSettings, build_router
from telemetry.http.fabric_calls import FabricCall, Forwarded
from tests.support.waiting import eventually
from tests.unit.router.fakes import Client, FakeQueue, router

PUBLIC = "0.0.0.0"  # noqa: S104 - nothing is bound: the test is that it is refused


class FakeManager:
    """A Manager that remembers what it was asked."""

    def __init__(self, *, down: bool = False) -> None:
        self.asked: list[tuple[str, str, str, str, bytes]] = []
        self.down = down

    async def forward(self, call: FabricCall) -> Forwarded:
        if self.down:
            raise ManagerUnavailable("the Manager is away", retry_after_s=2)
        assert call.request_id.startswith("req_")
        self.asked.append((call.method, call.path, call.query, call.join_token, call.body))
        return Forwarded(409, (("content-type", "application/json"),), b'{"error": {"code": "worker_id_taken"}}')

    async def broker_address(self) -> BrokerAddress:
        raise ManagerUnavailable("the Manager is away")

    async def close(self) -> None:
        return None


@pytest.mark.parametrize(
    "path",
    [
        "/sleep", "/v1/load_lora_adapter", "/reset_prefix_cache", "/collective_rpc", "/v1",
        "//v1/chat/completions", "/v1//chat/completions", "/v1/./chat/completions", "/x/../v1/chat/completions",
        "/v1/chat/completions/", "/v1/chat%2Fcompletions", "/v1/chat/completions%00", "/V1/chat/completions",
        "/v1/chat/completions;x", "/v1/chat/completions/../../sleep", "/fabric/v1/../../sleep",
    ],
)  # fmt: skip
async def test_other_paths_reach_no_engine(path: str) -> None:
    """Every path that is not exactly on the list is 404, however it is spelt."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = await Client(app).request("POST", path, b'{"model": "m"}')
        assert (answer.status, answer.error["code"]) == (404, "unknown_path")
        assert "x-request-id" in answer.headers
        assert queue.enqueued.empty()


async def test_an_encoded_spelling_of_a_good_path_is_another_path() -> None:
    """A server decodes paths before the app sees them; the Router compares what was written."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        sent = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b'{"model": "m"}'}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await app(scope | {"raw_path": b"/v1/%63ompletions"}, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 404
    assert queue.enqueued.empty()


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
async def test_inference_paths_answer_post_only(method: str) -> None:
    """Another method is 405 with the error object and the method that works."""
    async with router(FakeQueue("m")) as app:
        answer = await Client(app).request(method, "/v1/chat/completions")
    assert (answer.status, answer.error["code"], answer.headers["allow"]) == (
        405,
        "method_not_allowed",
        "OPTIONS, POST",
    )
    assert "x-request-id" in answer.headers


async def test_models_are_listed_as_openai_does() -> None:
    """The list and one model have OpenAI's shape; an unknown model is 404 model_not_found; ids may hold slashes."""
    async with router(FakeQueue("org/m"), pools=["idle"]) as app:
        listed = (await Client(app).request("GET", "/v1/models")).json()
        one = (await Client(app).request("GET", "/v1/models/org/m")).json()
        none = await Client(app).request("GET", "/v1/models/none")
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["org/m", "idle"]
    assert set(one) == {"id", "object", "created", "owned_by"}
    assert one["object"] == "model"
    assert type(one["created"]) is int
    assert (none.status, none.error["code"]) == (404, "model_not_found")


async def test_pools_show_depth_workers_and_slots() -> None:
    """An autoscaler reads one model's queue as flat numbers."""
    async with router(FakeQueue("m"), pools=["idle"]) as app:
        pool = (await Client(app).request("GET", "/fabric/v1/pools/m")).json()
        pools = (await Client(app).request("GET", "/fabric/v1/pools")).json()["pools"]
        none = await Client(app).request("GET", "/fabric/v1/pools/none")
    assert (pool["waiting"], pool["leased"], pool["outstanding"], pool["oldest_age_ms"]) == (2, 1, 3, 70)
    assert (pool["workers"], pool["slots"], pool["lanes"]["interactive"]["waiting"]) == (1, 4, 2)
    assert [entry["model"] for entry in pools] == ["idle", "m"]
    assert none.status == 404


async def test_worker_calls_are_forwarded_unchanged() -> None:
    """Method, path, query, body and join token go to the Manager; its status and body come back."""
    manager = FakeManager()
    async with router(FakeQueue("m"), manager) as app:
        client, token = Client(app), {"x-inferq-join-token": "t"}
        await client.request("GET", "/fabric/v1/workers", b"", token)
        answer = await client.request("POST", "/fabric/v1/workers", b'{"a": 1}', token)
        await client.request("POST", "/fabric/v1/workers/w1/heartbeat", b"{}")
        await client.request("POST", "/fabric/v1/workers/w1/drain")
        await client.request("DELETE", "/fabric/v1/workers/w1?session_id=w1.00")
        strange = await client.request("DELETE", "/fabric/v1/workers/..%2f")
    assert manager.asked == [
        ("GET", "/fabric/v1/workers", "", "t", b""),
        ("POST", "/fabric/v1/workers", "", "t", b'{"a": 1}'),
        ("POST", "/fabric/v1/workers/w1/heartbeat", "", "", b"{}"),
        ("POST", "/fabric/v1/workers/w1/drain", "", "", b""),
        ("DELETE", "/fabric/v1/workers/w1", "session_id=w1.00", "", b""),
    ]
    assert (answer.status, answer.json()) == (409, {"error": {"code": "worker_id_taken"}})
    assert strange.status == 400


async def test_a_cut_short_worker_call_is_a_client_error() -> None:
    """A client that disconnects in the middle of a body causes no traceback, and the Manager gets no call."""
    manager = FakeManager()
    async with router(FakeQueue("m"), manager) as app:
        client = Client(app)
        client.gone.set()
        answer = await client.begin("POST", "/fabric/v1/workers", [b'{"worker'], unfinished=True).done()
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert manager.asked == []


async def test_without_a_manager_worker_calls_are_refused_clearly() -> None:
    """No Manager configured, or none that answers, is 503 manager_unavailable."""
    for manager in (None, FakeManager(down=True)):
        async with router(FakeQueue("m"), manager) as app:
            answer = await Client(app).request("GET", "/fabric/v1/workers")
        assert (answer.status, answer.error["code"]) == (503, "manager_unavailable")
        assert "retry-after" in answer.headers


async def test_keys_guard_models_and_pools_but_not_health() -> None:
    """Models need an API key, pools a key or the join token, health and metrics neither."""
    digest = hashlib.sha256(b"k").hexdigest()
    async with router(FakeQueue("m"), api_keys=f"{digest}:t", join_token="jt") as app:
        client = Client(app)
        for path, headers, status in (
            ("/v1/models", {}, 401),
            ("/v1/models", {"authorization": "Bearer k"}, 200),
            ("/v1/models", {"x-inferq-join-token": "jt"}, 401),
            ("/fabric/v1/pools", {}, 401),
            ("/fabric/v1/pools", {"authorization": "Bearer k"}, 200),
            ("/fabric/v1/pools", {"x-inferq-join-token": "jt"}, 200),
            ("/healthz", {}, 200),
            ("/readyz", {}, 200),
            ("/metrics", {}, 200),
        ):
            answer = await client.request("GET", path, b"", headers)
            assert answer.status == status, path


async def test_readiness_says_why_the_router_is_not_ready() -> None:
    """Not connected, cut off, or shutting down: /readyz is 503 with the reason, /healthz stays 200."""
    async with router(BrokerUnavailable("Redis is loading")) as app:
        client = Client(app)
        await eventually(lambda: app.services.not_ready_reasons() == ["Redis is loading"], "the reason is known")
        answer = await client.request("GET", "/readyz")
        assert (answer.status, answer.json()["reasons"]) == (503, ["Redis is loading"])
        assert (await client.request("GET", "/healthz")).status == 200
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        assert (await client.request("GET", "/readyz")).status == 200
        queue.down = True
        await eventually(app.services.not_ready_reasons, "not ready")
        answer = await client.request("GET", "/readyz")
        assert (answer.status, answer.json()["reasons"]) == (503, ["Redis is away"])
        await app.drain()
        assert (await client.request("GET", "/readyz")).json()["reasons"] == ["the router is shutting down"]


async def test_an_unfit_redis_ends_a_router_that_never_had_another() -> None:
    """Too old, a replica, a wrong password: it is said and not waited for."""
    with pytest.raises(BaseExceptionGroup) as ended:
        async with asyncio.timeout(5), router(BrokerUnsuitable("Redis is too old: 6.2")):
            await asyncio.Event().wait()
    assert ended.group_contains(BrokerUnsuitable, match="Redis is too old")


async def test_the_router_waits_for_a_redis_that_became_unfit() -> None:
    """After a failover a replica may answer for a while: the Router says so and goes on when it is fit again."""
    faults: list[InferqError] = []
    queues: list[FakeQueue] = []

    async def open_queue() -> FakeQueue:
        if faults:
            raise faults.pop()
        queues.append(FakeQueue("m"))
        return queues[-1]

    app = build_router(RouterSettings(directory_interval_ms=20), open_queue=open_queue)
    async with asyncio.timeout(10), app.running():
        await eventually(lambda: not app.services.not_ready_reasons(), "connected")
        faults.append(BrokerUnsuitable("this is a replica"))
        queues[0].break_replies()
        await eventually(lambda: len(queues) == 2 and not app.services.not_ready_reasons(), "connected again")
    assert not faults


@pytest.mark.parametrize("url", ["foo://host", "http://nowhere", "redis://host:x"])
def test_an_invalid_redis_url_is_refused_at_the_start(url: str) -> None:
    """No Redis will ever answer there, so nothing is served."""
    with pytest.raises(BrokerUnsuitable, match="Redis URL"):
        build_router(RouterSettings(), BrokerSettings(redis_url=url))


async def test_our_own_routes_are_documented() -> None:
    """The OpenAPI document names every page of the Router's own."""
    async with router(FakeQueue("m")) as app:
        paths = (await Client(app).request("GET", "/openapi.json")).json()["paths"]
    assert {"/v1/models", "/fabric/v1/pools/{model}", "/fabric/v1/workers", "/healthz", "/metrics"} <= set(paths)


async def test_keys_are_read_again_when_their_file_changes(tmp_path: Path) -> None:
    """A key added to the file works without a restart, a broken file changes nothing, a removed key is out."""
    one, two = (hashlib.sha256(key).hexdigest() for key in (b"1", b"2"))
    file = tmp_path / "keys"
    file.write_text(f"{one}:a\n")

    async def allowed(client: Client, key: str) -> bool:
        return (await client.request("GET", "/v1/models", b"", {"authorization": f"Bearer {key}"})).status == 200

    async def refused(client: Client, key: str) -> bool:
        return not await allowed(client, key)

    async with router(FakeQueue("m"), api_keys_file=str(file)) as app:
        client = Client(app)
        assert await allowed(client, "1")
        assert not await allowed(client, "2")
        file.write_text(f"{one}:a\n{two}:b\n")
        await eventually(lambda: allowed(client, "2"), "the new key works")
        file.write_text("broken\n")
        app.services.keys.refresh()
        assert await allowed(client, "1")
        file.write_text(f"{two}:b\n")
        await eventually(lambda: refused(client, "1"), "the removed key is out")


def test_a_public_address_needs_keys() -> None:
    """Listening where others can reach it is refused without keys, unless insecure is set."""

    async def no_queue() -> FakeQueue:
        return FakeQueue()

    with pytest.raises(CannotStart, match="API keys"):
        build_router(RouterSettings(host=PUBLIC), open_queue=no_queue)
    build_router(RouterSettings(host=PUBLIC, insecure=True), open_queue=no_queue)
    build_router(RouterSettings(host=PUBLIC, api_keys=f"{'0' * 64}:t"), open_queue=no_queue)


def test_a_public_address_with_a_manager_needs_a_join_token() -> None:
    """API keys guard the models, not the fleet: a public Router that passes calls on to a Manager is refused without a
    join token, unless insecure is set."""

    async def no_queue() -> FakeQueue:
        return FakeQueue()

    keys = f"{'0' * 64}:t"
    with pytest.raises(CannotStart, match="set INFERQ_JOIN_TOKEN: without it anyone may join"):
        build_router(RouterSettings(host=PUBLIC, api_keys=keys), open_queue=no_queue, manager=FakeManager())
    for more in ({"join_token": "jt"}, {"insecure": True}, {"host": "127.0.0.1"}):
        settings = RouterSettings.load(**{"host": PUBLIC, "api_keys": keys} | more)
        build_router(settings, open_queue=no_queue, manager=FakeManager())


@pytest.mark.parametrize("given", [{}, {"x-inferq-join-token": ""}, {"authorization": "Bearer k"}])
@pytest.mark.parametrize("join_token", ["", "jt"])
async def test_dead_letters_are_not_shown_to_api_keys(given: dict[str, str], join_token: str) -> None:
    """They hold what all tenants asked: where API keys are needed, nothing but the join token opens them."""
    digest = hashlib.sha256(b"k").hexdigest()
    async with router(FakeQueue("m"), api_keys=f"{digest}:t", join_token=join_token) as app:
        for method, path in (
            ("GET", "/fabric/v1/dead"),
            ("GET", "/fabric/v1/dead/0:1-1"),
            ("POST", "/fabric/v1/dead/purge"),
        ):
            headers = {"content-type": "application/json"} | given
            answer = await Client(app).request(method, path, b'{"ids": ["0:1-1"]}', headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path


@pytest.mark.parametrize("join_token", ["jt", ""])
@pytest.mark.parametrize("token", [{}, {"x-inferq-join-token": "wrong"}, {"authorization": "Bearer k"}])
async def test_the_router_checks_the_join_token_itself(token: dict[str, str], join_token: str) -> None:
    """[A1] Without it nothing of the fleet passes a Router with API keys, not even to a Manager that asks for none: an
    API key does not help, and nothing does where the Router has no join token."""
    manager = FakeManager()
    digest = hashlib.sha256(b"k").hexdigest()
    async with router(FakeQueue("m"), manager, api_keys=f"{digest}:t", join_token=join_token) as app:
        for method, path in (
            ("GET", "/fabric/v1/workers"),
            ("POST", "/fabric/v1/workers"),
            ("POST", "/fabric/v1/workers/w1/heartbeat"),
            ("GET", "/fabric/v1/workers/w1/session?session_id=w1." + "0" * 16),
            ("POST", "/fabric/v1/workers/w1/check?session_id=w1." + "0" * 16),
            ("POST", "/fabric/v1/workers/w1/drain"),
            ("DELETE", "/fabric/v1/workers/w1?session_id=w1.00"),
            ("GET", "/fabric/v1/broker"),
        ):
            answer = await Client(app).request(method, path, b"", token)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path
    assert manager.asked == []


async def test_an_api_key_does_not_list_the_workers() -> None:
    """[A5] Ids, addresses and engines of the workers are for who shows the join token, not for each API key."""
    digest = hashlib.sha256(b"k").hexdigest()
    path, key, token = "/fabric/v1/workers", {"authorization": "Bearer k"}, {"x-inferq-join-token": "jt"}
    manager = FakeManager()
    async with router(FakeQueue("m"), manager, api_keys=f"{digest}:t", join_token="jt") as app:
        client = Client(app)
        for given in ({}, {"x-inferq-join-token": "no"}, key):
            assert (await client.request("GET", path, b"", given)).status == 401
        await client.request("GET", path, b"", key | token)
    assert manager.asked == [("GET", path, "", "jt", b"")]
    async with router(FakeQueue("m"), FakeManager(), join_token="jt") as app:
        assert (await Client(app).request("GET", path)).status == 401


def test_a_router_needs_a_redis_or_manager_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a Redis URL nor a Manager is a mistake that shows at the start."""
    monkeypatch.delenv("INFERQ_REDIS_URL", raising=False)
    with pytest.raises(CannotStart, match="--redis-url"):
        build_router(RouterSettings())


async def test_the_app_runs_under_a_lifespan() -> None:
    """A server that speaks lifespan starts and ends everything through it."""
    queue = FakeQueue("m")

    async def open_queue() -> FakeQueue:
        return queue

    app = build_router(RouterSettings(), open_queue=open_queue)
    messages: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    sent: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    life = asyncio.ensure_future(app({"type": "lifespan"}, messages.get, sent.put))  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        await messages.put({"type": "lifespan.startup"})
        assert (await sent.get())["type"] == "lifespan.startup.complete"
        await queue.replies.ready.wait()
        await messages.put({"type": "lifespan.shutdown"})
        assert (await sent.get())["type"] == "lifespan.shutdown.complete"
        await life
    assert queue.closed

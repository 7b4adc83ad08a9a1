"""A queue and a client in memory, for tests of the Router's ASGI app without a socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import orjson

from broker import JobStatus, RememberedPools
from queue_schemas import (
    END,
    HEAD,
    Assignment,
    BrokerUnavailable,
    EngineState,
    Enqueued,
    Frame,
    InferqError,
    Job,
    JobId,
    Lane,
    LaneDepth,
    Marker,
    MarkerKind,
    OutputPage,
    PersistedJob,
    PersistOptions,
    Pool,
    SessionId,
    State,
    Tenant,
    WorkerInfo,
)
from router import RouterApp, RouterSettings, build_router
from router.ports import Deliver, ManagerPort
from scheduling.prediction import Place

SSE = "text/event-stream; charset=utf-8"
LIMIT_S = 5.0


def worker(*models: str, engine: EngineState = EngineState.READY, slots: int = 4) -> WorkerInfo:
    return WorkerInfo(
        worker_id="w1", session_id="w1." + "0" * 16, models=list(models), slots=slots, engine=engine,
        assignment=Assignment(term=1, version=1),
    )  # fmt: skip


def persisted_job(job: Job, keep: PersistOptions, state: State = State.QUEUED, **fields: Any) -> PersistedJob:
    """What the queue tells of a job that it keeps."""
    defaults: dict[str, Any] = {
        "epoch": 1, "attempts": 0, "now_ms": 2_000, "created_ms": 1_000, "deadline_ms": 1_000 + job.ttl_ms,
        "background": keep.background, "topic": keep.topic, "metadata": keep.metadata,
    }  # fmt: skip
    return PersistedJob(
        id=job.id, tenant=job.tenant, model=job.model, lane=job.lane, state=state, **(defaults | fields)
    )


class FakeQueue:
    """The Router's side of the broker, and each part of it. Tests play the worker: they take what was ``enqueued`` and
    call :meth:`answer`."""

    def __init__(self, *models: str) -> None:
        self.jobs = self.replies = self.persisted_jobs = self.output = self.fleet = self.known_pools = self.stats = self
        self.ready = asyncio.Event()
        self.round_trips = 0
        self.workers = {"w1": worker(*models)} if models else {}
        self.adapter_sets: dict[str, frozenset[str]] = {}
        self.pools: dict[Pool, bool] = {}
        self.scaled: frozenset[Pool] = frozenset()
        self.enqueued: asyncio.Queue[Job] = asyncio.Queue()
        self.cancelled: asyncio.Queue[tuple[JobId, str]] = asyncio.Queue()
        self.used: dict[JobId, int] = {}
        """What cancelled jobs had cost."""
        self.resumed: asyncio.Queue[tuple[Job, int]] = asyncio.Queue()
        self.resume_state: State | None = State.QUEUED
        self.resume_refusal: InferqError | None = None
        self.refusal: Exception | None = None
        self.holder: Enqueued | None = None
        """Who holds the idempotency key of the next persisted requests."""
        self.persist_options: dict[JobId, PersistOptions] = {}
        """How the output of each queued job is to be persisted."""
        self.persisted: dict[JobId, PersistedJob] = {}
        self.outputs: dict[JobId, OutputPage] = {}
        """The persisted output of each job, on one page."""
        self.page_frames = 1_000
        self.attached: list[tuple[JobId, tuple[int, int]]] = []
        self.attach_allowed = asyncio.Event()
        self.attach_allowed.set()
        self.attach_refusals: list[InferqError] = []
        """Errors of the next reads of an output."""
        self.detached: asyncio.Queue[JobId] = asyncio.Queue()
        self.state = State.QUEUED
        self.job_status: JobStatus | None = None
        """The status of every job; None: queued, in an epoch above the one asked about."""
        self.place: Place | None = None
        """Where each job stands."""
        self.hold_enqueue = False
        """Whether enqueues wait until :attr:`enqueues_released`."""
        self.enqueues_released = asyncio.Event()
        self.enqueues: set[asyncio.Future[Enqueued]] = set()
        """Those under way that a request awaits."""
        self.down = False
        self.closed = False
        self._deliver: Deliver | None = None
        self._lost: Callable[[int], None] | None = None
        self._broken = asyncio.Event()

    def shard_of(self, pool: str) -> int:
        return 0

    def start_enqueue(self, job: Job, patience_ms: int | None = None) -> asyncio.Future[Enqueued]:
        async def enqueue() -> Enqueued:
            return Enqueued(job.id, await self.enqueue(job))

        enqueued = asyncio.ensure_future(enqueue())
        self.enqueues.add(enqueued)
        enqueued.add_done_callback(self.enqueues.discard)
        return enqueued

    async def enqueue(self, job: Job) -> State:
        if self.hold_enqueue:
            await self.enqueues_released.wait()
        if self.refusal is not None:
            raise self.refusal
        self.enqueued.put_nowait(job)
        return self.state

    async def enqueue_persisted(
        self, job: Job, options: PersistOptions | None = None, listener: str = "", patience_ms: int | None = None
    ) -> Enqueued:
        assert options is not None
        state = await self.enqueue(job)
        self.persist_options[job.id] = options
        found = self.holder or Enqueued(job.id, state)
        self.persisted.setdefault(found.job_id, persisted_job(job, options))
        return found

    async def places(self, job_ids: Sequence[JobId]) -> list[Place | None]:
        return [self.place] * len(job_ids)

    async def get(self, job_id: str) -> PersistedJob | None:
        return self.persisted.get(JobId(job_id))

    async def page(
        self, tenant: Tenant, *, after: str = "", limit: int = 20, states: Iterable[State] = ()
    ) -> tuple[list[PersistedJob], str]:
        allowed = set(states)
        mine = [
            job for job in self.persisted.values() if job.tenant == tenant and (not allowed or job.state in allowed)
        ]
        behind = [job.id for job in mine].index(JobId(after)) + 1 if after else 0
        page = mine[behind : behind + limit]
        return page, page[-1].id if mine[behind + limit :] else ""

    async def delete(self, job_id: str, reason: str) -> State | None:
        gone = self.persisted.pop(JobId(job_id), None)
        return gone.state if gone else None

    async def cancel_abandoned(self, job_id: JobId, reason: str, after_ms: int) -> State | None:
        self.cancelled.put_nowait((job_id, reason))
        return State.LEASED

    async def attach(self, job_id: JobId, listener: SessionId, after: tuple[int, int] = (0, 0)) -> OutputPage | None:
        self.attached.append((job_id, after))
        await self.attach_allowed.wait()
        if self.attach_refusals:
            raise self.attach_refusals.pop(0)
        output = self.outputs.get(job_id)
        if output is None:
            return None
        rest = [frame for frame in output.frames if (frame.epoch, frame.seq) >= after]
        return replace(output, frames=tuple(rest[: self.page_frames]), complete=len(rest) <= self.page_frames)

    async def frames(self, job_id: JobId) -> AsyncIterator[Frame]:
        output = self.outputs.get(job_id)
        for frame in output.frames if output else ():
            yield frame

    async def detach(self, job_id: JobId, listener: SessionId) -> None:
        self.detached.put_nowait(job_id)

    async def resume(self, job: Job, epoch: int) -> State | None:
        self.resumed.put_nowait((job, epoch))
        if self.resume_refusal is not None:
            raise self.resume_refusal
        return self.resume_state

    async def raise_epoch(self, job_id: JobId, heard: int) -> JobStatus | None:
        return self.job_status or JobStatus(self.state, heard + 1, "")

    async def cancel(self, job_id: JobId, reason: str, *, if_orphaned: bool = False, used: int = 0) -> State | None:
        self.used[job_id] = used
        self.cancelled.put_nowait((job_id, reason))
        return State.LEASED

    async def read(self, router: SessionId, deliver: Deliver, lost: Callable[[int], None] | None = None) -> NoReturn:
        self._deliver, self._lost = deliver, lost
        self.ready.set()
        await self._broken.wait()
        raise BrokerUnavailable("the connection broke")

    async def server_faults(self) -> list[str]:
        return []

    async def load_workers(self) -> dict[str, WorkerInfo]:
        if self.down:
            raise BrokerUnavailable("Redis is away")
        return self.workers

    async def load_adapter_sets(self, names: Collection[str]) -> dict[str, frozenset[str]]:
        return {name: self.adapter_sets[name] for name in names if name in self.adapter_sets}

    async def remembered(self) -> RememberedPools:
        return RememberedPools(self.pools, self.scaled)

    async def remember(self, models: Iterable[str], *, declared: bool = False) -> None:
        self.pools |= {Pool(model): declared for model in models}

    async def depths(self) -> dict[Pool, dict[Lane, LaneDepth]]:
        return {Pool("m"): {Lane.INTERACTIVE: LaneDepth(waiting=2, leased=1, oldest_age_ms=70)}}

    async def close(self) -> None:
        self.closed = True

    async def job(self) -> Job:
        """The next job the Router enqueued."""
        async with asyncio.timeout(LIMIT_S):
            return await self.enqueued.get()

    async def cancellation(self) -> tuple[JobId, str]:
        async with asyncio.timeout(LIMIT_S):
            return await self.cancelled.get()

    def deliver(self, *items: Frame | Marker) -> None:
        assert self._deliver is not None
        self._deliver(list(items))

    def break_replies(self) -> None:
        """The connection on which answers come ends."""
        self._broken.set()

    def lose_replies(self) -> None:
        assert self._lost is not None
        self._lost(0)

    def answer(
        self, job: Job, data: bytes, *, status: int = 200, kind: str = "application/json", epoch: int = 1
    ) -> None:
        """A whole plain answer."""
        self.deliver(Frame(job.id, epoch, "a", 0, HEAD | END, data, status, kind))

    def stream(self, job: Job, *pieces: bytes, end: bool = True, epoch: int = 1, first: int = 0) -> None:
        """Pieces of a streamed answer."""
        for seq, data in enumerate(pieces, first):
            flags = (HEAD if seq == 0 else 0) | (END if end and seq == first + len(pieces) - 1 else 0)
            status, kind = (200, SSE) if flags & HEAD else (0, "")
            self.deliver(Frame(job.id, epoch, f"a{epoch}", seq, flags, data, status, kind))

    def mark(self, job: Job, kind: MarkerKind, epoch: int = 1, reason: str = "") -> None:
        self.deliver(Marker(kind, job.id, epoch, reason))


class PersistedStream:
    """A persisted stream that is being written: a Router that reads a silent job finds it there."""

    def __init__(self, queue: FakeQueue, job: Job) -> None:
        self._queue = queue
        self._job = job
        self._frames: tuple[Frame, ...] = ()
        self._persist(State.LEASED)

    def say(self, *pieces: bytes, end: bool = False) -> None:
        """Some more of it; ``end``: it is whole then."""
        first = len(self._frames)
        for seq, data in enumerate(pieces, first):
            flags = (0 if seq else HEAD) | (END if end and seq == first + len(pieces) - 1 else 0)
            head = (0, "") if seq else (200, SSE)
            self._frames += (Frame(self._job.id, 1, "a1", seq, flags, data, *head),)
        self._persist(State.DONE if end else State.LEASED)
        self._queue.deliver(*self._frames[first:])

    def _persist(self, state: State) -> None:
        last = (1, len(self._frames)) if self._frames else (0, 0)
        self._queue.outputs[self._job.id] = OutputPage(state, 1, "a1", last, self._frames, complete=True)


@dataclass
class Answer:
    """One HTTP exchange with the app, as far as it has come."""

    task: asyncio.Task[None]
    client: Client
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json()["error"]
        return error

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def done(self) -> Answer:
        async with asyncio.timeout(LIMIT_S):
            await self.task
        return self


class Client:
    """Speaks ASGI to an app. ``gone`` disconnects; ``stalled`` stops reading until it is cleared."""

    def __init__(self, app: RouterApp) -> None:
        self._app = app
        self.gone = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()

    def begin(
        self,
        method: str,
        path: str,
        pieces: Iterable[bytes] = (b"",),
        headers: Mapping[str, str] | None = None,
        *,
        unfinished: bool = False,
    ) -> Answer:
        """Start a request with the body ``pieces``; ``unfinished``: its end never comes."""
        bare, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": bare,
            "raw_path": bare.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http",
            "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        if not unfinished:
            messages[-1]["more_body"] = False

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await self.reading.wait()
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answer.body += message.get("body", b"")
                answer.complete = not message.get("more_body", False)
            answer.changed.set()

        answer = Answer(asyncio.ensure_future(self._app(scope, receive, send)), self)  # type: ignore[arg-type]
        return answer

    async def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        return await self.begin(method, path, [body], headers).done()

    def post(self, fields: Any, path: str = "/v1/chat/completions", headers: Mapping[str, str] | None = None) -> Answer:
        body = fields if isinstance(fields, bytes) else orjson.dumps(fields)
        return self.begin("POST", path, [body], headers)


@contextlib.asynccontextmanager
async def router(
    queue: FakeQueue | InferqError | None = None, manager: ManagerPort | None = None, **settings: Any
) -> AsyncIterator[RouterApp]:
    """A running Router over ``queue``; without one, or with an error, the queue cannot be reached."""
    settings = {"sweep_interval_ms": 10, "directory_interval_ms": 20, "shutdown_timeout_ms": 100} | settings

    async def open_queue() -> FakeQueue:
        if isinstance(queue, FakeQueue):
            return queue
        raise queue or BrokerUnavailable("Redis is not there")

    app = build_router(RouterSettings(**settings), open_queue=open_queue, manager=manager)
    async with app.running():
        if isinstance(queue, FakeQueue):
            async with asyncio.timeout(LIMIT_S):
                await queue.replies.ready.wait()
                await app.services.link.fresh_directory()
        yield app

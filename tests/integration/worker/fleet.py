"""A small fleet of real processes, and a client that stands where a Router would."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from broker import Broker, BrokerSettings
from manager.service import serve as serve_manager
from manager.settings import ManagerSettings
from queue_schemas import (
    END,
    HEAD,
    Frame,
    Job,
    JobId,
    Marker,
    MarkerKind,
    Pool,
    SessionId,
    Tenant,
    new_job_id,
    new_session_id,
)
from telemetry import render_metrics
from telemetry.environment import HeldPorts, free_port
from telemetry.http.server import bind_socket
from tests.support.processes import Child
from tests.support.servers import Server
from tests.support.waiting import eventually
from worker import service

LEASE_MS = 2_000
SIM = ("--engine", "sim", "--sim-tokens-per-s", "50", "--sim-ttft-ms", "5")


def get_json(url: str) -> Any:
    """The page at ``url``; None if nobody answers or it is no success."""
    try:
        with urlopen(url, timeout=5) as answer:  # noqa: S310 - of our own processes
            return json.loads(answer.read())
    except (URLError, OSError):
        return None


class Worker:
    """One worker process."""

    def __init__(self, fleet: Fleet, name: str, port: int, args: Sequence[str]) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "worker.service", "--worker-id", name, "--port", str(port)]
        command += ["--manager-url", fleet.manager_url, *args]
        log = fleet.folder / f"{name}-{port}.log"
        self.process = Child(name, command, log, cwd=fleet.folder, preloaded=True)

    def status(self) -> Any:
        return get_json(f"{self.url}/status")

    def metrics(self) -> str:
        with urlopen(f"{self.url}/metrics", timeout=5) as answer:  # noqa: S310
            page: bytes = answer.read()
        return page.decode()

    async def until_ready(self, limit_s: float = 30.0) -> Worker:
        def ready() -> bool:
            assert self.process.running, self.process.log_tail()
            return bool((self.status() or {}).get("ready"))

        await eventually(ready, f"{self.name} is ready\n{self.process.log_tail()}", limit_s=limit_s, every_s=0.05)
        return self

    async def ended(self, limit_s: float = 15.0) -> int:
        """Its exit code."""
        await eventually(lambda: not self.process.running, f"{self.name} has ended", limit_s=limit_s)
        code = self.process.returncode
        assert code is not None
        return code

    def post(self, path: str) -> int:
        with urlopen(Request(f"{self.url}{path}", method="POST"), timeout=5) as answer:  # noqa: S310
            status: int = answer.status
        return status


class Fleet:
    """A Manager with a short lease, and the workers that a test starts. All of it ends with the test."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self._ports = HeldPorts()
        self.manager_port = self._ports.take()
        self.manager_url = f"http://127.0.0.1:{self.manager_port}"
        self.workers: list[Worker] = []
        command = [sys.executable, "-m", "manager.service", "--port", str(self.manager_port)]
        command += ["--redis-url", server.url, "--lease-ms", str(LEASE_MS), "--sweep-interval-ms", "200"]
        command += ["--heartbeat-interval-ms", "200", "--unresponsive-after-ms", "1000"]
        # A probe of a paused worker must not outlast the third of a lease in which renewal counters are read again.
        command += ["--probe-timeout-ms", "200", "--ping-timeout-ms", "200"]
        self.manager = Child("manager", command, folder / "manager.log", cwd=folder, preloaded=True)

    async def start_manager(self) -> None:
        self.manager.start()
        await eventually(lambda: get_json(f"{self.manager_url}/readyz"), "the Manager is ready", limit_s=20)

    def worker(self, name: str, *args: str, engine: bool = True) -> Worker:
        """Start a worker; with ``engine`` a simulated one of its own name, in its process."""
        sim = [*SIM, "--sim-name", name]
        worker = Worker(self, name, self._ports.take(), [*(sim if engine else ()), *args])
        worker.process.start()
        self.workers.append(worker)
        return worker

    def stop(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        self.manager.kill()
        self._ports.close()


class Answer:
    """What has come back for one job: the frames of its newest attempt, and all markers."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.markers: list[Marker] = []
        self.epoch = 0

    def take(self, item: Frame | Marker) -> None:
        if isinstance(item, Marker):
            self.markers.append(item)
            return
        if item.epoch < self.epoch:
            return
        if item.epoch > self.epoch or (self.frames and item.attempt_id != self.frames[-1].attempt_id):
            self.frames.clear()
            self.epoch = item.epoch
        if item.seq == len(self.frames):
            self.frames.append(item)

    @property
    def complete(self) -> bool:
        return bool(self.frames) and bool(self.frames[-1].flags & END)

    @property
    def ended(self) -> bool:
        return self.complete or any(marker.kind is not MarkerKind.REQUEUED for marker in self.markers)

    @property
    def status(self) -> int:
        assert self.frames[0].flags & HEAD
        return self.frames[0].status

    @property
    def body(self) -> bytes:
        return b"".join(frame.data for frame in self.frames)


class Client:
    """Enqueues jobs and collects their answers, as a Router does."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.session_id: SessionId = new_session_id("router")
        self.answers: dict[JobId, Answer] = {}

    def deliver(self, items: list[Frame | Marker]) -> None:
        for item in items:
            self.answers.setdefault(item.job_id, Answer()).take(item)

    async def send(
        self, *, model: str = "sim", stream: bool = False, max_tokens: int = 8, order: Any = None, **fields: Any
    ) -> JobId:
        """Enqueue a chat; ``order`` is a failure for the simulated engine."""
        body: dict[str, Any] = {"model": model, "stream": stream, "max_tokens": max_tokens, "ignore_eos": True}
        body["messages"] = [{"role": "user", "content": "hello"}]
        if order is not None:
            body["sim"] = order
        job = Job(
            id=new_job_id(0),
            tenant=Tenant("t"),
            model=Pool(model),
            path="/v1/chat/completions",
            body=json.dumps(body).encode(),
            stream=stream,
            reply_to=self.session_id,
            request_id=f"req_{len(self.answers)}",
            **fields,
        )
        self.answers[job.id] = Answer()
        await self.broker.jobs.enqueue(job)
        return job.id

    async def answer(self, job_id: JobId, limit_s: float = 20.0) -> Answer:
        """The answer, once it is complete or will never be."""
        answer = self.answers[job_id]
        await eventually(lambda: answer.ended, f"job {job_id} ends ({answer.markers})", limit_s=limit_s)
        return answer

    async def begun(self, job_id: JobId) -> Answer:
        """The answer, once its first frame is here."""
        answer = self.answers[job_id]
        await eventually(lambda: answer.frames, f"job {job_id} begins")
        return answer

    async def ask(self, **options: Any) -> Answer:
        """Send and wait."""
        return await self.answer(await self.send(**options))

    async def until_listed(self, *names: str) -> None:
        """The registry says to all that these workers take jobs."""

        async def listed() -> bool:
            workers = await self.broker.fleet.load_workers()
            return all(name in workers and workers[name].takes_work for name in names)

        await eventually(listed, f"{', '.join(names)} are listed")

    async def until_nothing_is_left(self) -> None:
        """Every queue and every lease is empty."""

        async def empty() -> bool:
            return not any(
                lane.waiting or lane.leased
                for pool in (await self.broker.stats.depths()).values()
                for lane in pool.values()
            )

        await eventually(empty, "no job waits or runs")


class LocalWorker:
    """A worker inside the test's own process."""

    def __init__(self, name: str, worker: service.Worker, task: asyncio.Task[None]) -> None:
        self.name = name
        self.worker = worker
        self.task = task

    @property
    def running(self) -> int:
        return self.worker.status().running

    def metrics(self) -> str:
        return render_metrics(self.worker.registry)[0].decode()

    async def until_ready(self) -> LocalWorker:
        def ready() -> bool:
            assert not self.task.done(), self.task
            return self.worker.status().ready

        await eventually(ready, f"{self.name} is ready", limit_s=30)
        return self


class LocalFleet:
    """Manager and workers inside the test's own process: for what needs no kill."""

    def __init__(self, server: Server, folder: Path, group: asyncio.TaskGroup) -> None:
        self.manager_url = ""
        self._server = server
        self._folder = folder
        self._group = group
        self._stop = asyncio.Event()
        self._workers: list[LocalWorker] = []

    async def start_manager(self) -> None:
        port = free_port()
        settings = ManagerSettings.load(
            port=port, sweep_interval_ms=200, heartbeat_interval_ms=200, unresponsive_after_ms=1_000, lease_ms=LEASE_MS
        )
        self._group.create_task(serve_manager(settings, BrokerSettings(redis_url=self._server.url), stop=self._stop))
        self.manager_url = f"http://127.0.0.1:{port}"
        ready = f"{self.manager_url}/readyz"
        await eventually(lambda: asyncio.to_thread(get_json, ready), "the Manager is ready", limit_s=20)

    def worker(self, name: str, *args: str) -> LocalWorker:
        """Start a worker with a simulated engine of its own name."""
        listener = bind_socket("127.0.0.1", 0)
        flags = ["--worker-id", name, "--manager-url", self.manager_url, *SIM, "--sim-name", name, *args]
        flags += ["--engine-log-dir", str(self._folder)]
        worker = service.Worker(service.read_settings(flags)[0], listener)
        local = LocalWorker(name, worker, self._group.create_task(worker.run()))
        self._workers.append(local)
        return local

    async def stop(self) -> None:
        for local in self._workers:
            local.worker.drain.set()
        await asyncio.wait([local.task for local in self._workers] or [asyncio.create_task(asyncio.sleep(0))])
        self._stop.set()


@asynccontextmanager
async def local_fleet_on(server: Server, folder: Path) -> AsyncIterator[tuple[LocalFleet, Client]]:
    """Manager, workers and client in this process."""
    async with client_on(server) as client, asyncio.TaskGroup() as group:
        fleet = LocalFleet(server, folder, group)
        await fleet.start_manager()
        yield fleet, client
        await fleet.stop()


@asynccontextmanager
async def client_on(server: Server) -> AsyncIterator[Client]:
    """A client whose replies are read."""
    broker = await Broker.connect(BrokerSettings(redis_url=server.url))
    client = Client(broker)
    reading = asyncio.create_task(broker.replies.read(client.session_id, client.deliver))
    try:
        await asyncio.wait_for(broker.replies.ready.wait(), 10)
        yield client
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await broker.close()


@asynccontextmanager
async def fleet_on(server: Server, folder: Path) -> AsyncIterator[tuple[Fleet, Client]]:
    """A Manager on ``server`` and a client; workers are the test's own."""
    async with client_on(server) as client:
        fleet = Fleet(server, folder)
        try:
            await fleet.start_manager()
            yield fleet, client
        finally:
            await asyncio.to_thread(fleet.stop)

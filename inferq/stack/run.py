"""The life of a stack: ports checked, queue, Manager, Router and workers started, and stopped in order."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp

from broker import Broker, BrokerSettings
from broker.embedded.server import EmbeddedServer
from queue_schemas import CannotStart
from telemetry.http.fleet_session import fleet_session
from telemetry.http.server import bind_socket

from .join_token import TOKEN_FILE, load_or_create_join_token, needs_join_token
from .plan import RoleSpec, StackPlan
from .process import RoleProcess, ask

QUEUE_CHECK_LIMIT_MS = 5_000
LISTED_LIMIT_S, LISTED_POLL_S = 15.0, 0.1
PAGE_LIMIT_S = 60.0
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class RunningStack:
    """What runs, for the person who started it. URLs carry no passwords."""

    router_url: str
    manager_url: str
    service_urls: Mapping[str, str]
    worker_urls: Mapping[str, str]
    queue: str
    logs: Path
    pids: Mapping[str, int]
    ready_after_s: float
    first_model: str = ""
    """The first model that the Router lists; empty if it lists none, or requires an API key."""
    join_token_file: str = ""
    """The file with the join token that was created for this stack; empty if none was."""


class Announcer(Protocol):
    """Where a stack reports."""

    def starting(self, what: str) -> None:
        """Said of each part, and again as what it waits for changes. Called often."""
        ...

    def trouble(self, role: str, text: str) -> None:
        """An error of a role."""
        ...

    def up(self, stack: RunningStack) -> None:
        """Everything is ready."""
        ...

    def stopping(self, what: str) -> None:
        """Said of each part."""
        ...


async def run_stack(
    plan: StackPlan,
    announcer: Announcer,
    stop: asyncio.Event,
    *,
    redis_url: str = "",
    hurry: asyncio.Event | None = None,
) -> None:
    """Run ``plan`` until ``stop`` is set or a part of it cannot be kept running. With ``hurry`` set, its processes are
    told not to wait for what runs.

    Without ``redis_url`` an embedded server is started on the data folder. Raises ``CannotStart`` or a broker's error
    with a sentence that says what to correct; whatever had been started is stopped in order first.
    """
    began = time.monotonic()
    _check_ports(plan)
    async with AsyncExitStack() as exits:
        failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watchers = await exits.enter_async_context(_watchers(failure))
        url, queue = await _open_queue(plan, announcer, exits, watchers, redis_url)
        environment = {**os.environ, "INFERQ_REDIS_URL": url}
        if needs_join_token():
            environment["INFERQ_JOIN_TOKEN"] = load_or_create_join_token(plan.data_dir)
        processes = [RoleProcess(role, plan.data_dir / "logs", environment, announcer.trouble) for role in plan.roles]
        exits.push_async_callback(_stop_in_order, plan, processes, announcer, hurry)
        session = await exits.enter_async_context(fleet_session(PAGE_LIMIT_S))
        starting = watchers.start(_start(plan, processes, session, announcer, watchers), "start of the stack")
        await _first_of(starting, stop, failure)
        if not stop.is_set():
            token_file = str(plan.data_dir / TOKEN_FILE) if needs_join_token() else ""
            announcer.up(_describe(plan, processes, queue, token_file, starting.result(), time.monotonic() - began))
            await _first_of(None, stop, failure)


async def _open_queue(
    plan: StackPlan, announcer: Announcer, exits: AsyncExitStack, watchers: _Watchers, redis_url: str
) -> tuple[str, str]:
    """The queue's URL, and what to call it."""
    if redis_url:
        announcer.starting("the queue's Redis")
        settings = BrokerSettings.load(redis_url=redis_url, retry_limit_ms=QUEUE_CHECK_LIMIT_MS)
        await (await Broker.connect(settings)).close()
        return redis_url, re.sub(r"//[^@/]*@", "//", redis_url)
    announcer.starting("the queue (embedded Valkey)")
    server = EmbeddedServer(plan.data_dir / "valkey")
    await server.start()
    exits.push_async_callback(_stop_queue, server, announcer)
    watchers.start(server.watch(), "embedded Valkey")
    return server.url, f"embedded Valkey on 127.0.0.1:{server.port}, data in {server.data_dir}"


async def _stop_queue(server: EmbeddedServer, announcer: Announcer) -> None:
    announcer.stopping("queue")
    await server.stop()


async def _start(
    plan: StackPlan,
    processes: Sequence[RoleProcess],
    session: aiohttp.ClientSession,
    announcer: Announcer,
    watchers: _Watchers,
) -> str:
    """Start all processes concurrently, as each waits for what it needs, until all are ready; the first model that the
    Router lists."""
    for process in processes:
        watchers.start(process.run(), process.spec.name)
    for process in processes:
        limit_s = process.spec.ready_limit_s
        try:
            async with asyncio.timeout(limit_s):
                await process.wait_ready(session, _tell_waiting(announcer, process.spec))
        except TimeoutError as error:
            raise CannotStart(
                f"{process.spec.name} was not ready within {limit_s:.0f} s; its log: {process.log_path}"
            ) from error
    if not plan.workers:
        return ""
    announcer.starting("router: waiting for a model")
    return await _first_listed(session, plan.router.url)


async def _first_listed(session: aiohttp.ClientSession, router_url: str) -> str:
    """Wait until the Router lists a model, so that the example that we print works; the model's id.

    Empty if the Router requires an API key, or lists none for a while, as an attached server may.
    """
    limit = time.monotonic() + LISTED_LIMIT_S
    while time.monotonic() < limit:
        status, text = await ask(session, f"{router_url}/v1/models")
        if status != 200:
            return ""
        if models := json.loads(text).get("data"):
            return str(models[0]["id"])
        await asyncio.sleep(LISTED_POLL_S)
    return ""


def _tell_waiting(announcer: Announcer, role: RoleSpec) -> Callable[[str], None]:
    return lambda reason: announcer.starting(f"{role.name}: {reason}")


async def _stop_in_order(
    plan: StackPlan, processes: Sequence[RoleProcess], announcer: Announcer, hurry: asyncio.Event | None
) -> None:
    """The Router first, so that nothing new comes in, then who puts more work on the queue, then the workers, which
    finish what they run; the Manager last."""
    order = [
        ("router", [plan.router]),
        ("batches", plan.services),
        ("workers", plan.workers),
        ("manager", [plan.manager]),
    ]
    for name, specs in order:
        step = [process for process in processes if process.spec in specs]
        if step:
            announcer.stopping(name)
        await asyncio.gather(*(process.stop(hurry) for process in step))


async def _first_of(task: asyncio.Task[Any] | None, stop: asyncio.Event, failure: asyncio.Future[None]) -> None:
    """Wait for the end of ``task``, for ``stop`` or for ``failure``; raises what ``task`` or ``failure`` raises."""
    async with asyncio.TaskGroup() as group:
        stopped = group.create_task(stop.wait(), name="stop signal")
        waited: set[asyncio.Future[Any]] = {stopped, failure}
        await asyncio.wait(waited | ({task} if task else set()), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
    if failure.done():
        failure.result()


class _Watchers:
    """Tasks that run for as long as the stack; the first that fails fails the stack."""

    def __init__(self, failure: asyncio.Future[None]) -> None:
        self._failure = failure
        self.tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, _Result], name: str) -> asyncio.Task[_Result]:
        task = asyncio.create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and not self._failure.done() and (error := task.exception()) is not None:
            self._failure.set_exception(error)


@asynccontextmanager
async def _watchers(failure: asyncio.Future[None]) -> AsyncIterator[_Watchers]:
    """Ends with all its tasks ended. (No TaskGroup: what failed must not cut short the orderly stop of the rest.)"""
    watchers = _Watchers(failure)
    try:
        yield watchers
    finally:
        for task in watchers.tasks:
            task.cancel()
        await asyncio.gather(*watchers.tasks, return_exceptions=True)
        if not failure.cancel() and not failure.cancelled():
            failure.exception()  # raised already, or too late to matter: the stack was being stopped


def _check_ports(plan: StackPlan) -> None:
    for role in plan.roles:
        bind_socket(role.host, role.port, setting=role.port_flag).close()


def _describe(
    plan: StackPlan, processes: Sequence[RoleProcess], queue: str, token_file: str, model: str, ready_after_s: float
) -> RunningStack:
    return RunningStack(
        router_url=plan.router.url,
        manager_url=plan.manager.url,
        service_urls={service.name: service.url for service in plan.services},
        worker_urls={worker.name: worker.url for worker in plan.workers},
        queue=queue,
        logs=plan.data_dir / "logs",
        pids={process.spec.name: process.pid or 0 for process in processes},
        ready_after_s=ready_after_s,
        first_model=model,
        join_token_file=token_file,
    )

"""The engine that a worker would run, and the fabric that runs already."""

from __future__ import annotations

import shutil

import aiohttp

from inferq.client import CREDENTIALS_ADVICE, RequestFailed
from inferq.fleet.client import FleetClient
from inferq.vllm_setup import DEFAULT_MODEL, SetupFailed, find_default_model, find_vllm, plan_setup
from inferq.vllm_setup.cache import cache_dir
from inferq.vllm_setup.environment import read_host
from telemetry.http.fleet_session import fleet_session

from .findings import ASK_LIMIT_S, DoctorTarget, Finding, Level


async def check_engine(examined: DoctorTarget) -> list[Finding]:
    """Check whether an engine answers, or vLLM is installed."""
    if examined.engine_url:
        return [await _attached(examined.engine_url)]
    own = shutil.which("vllm")
    if own is not None:
        return [Finding("engine", Level.OK, f"vLLM on PATH: {own}")]
    prepared = find_vllm()
    if prepared is not None:
        model = "with" if find_default_model() else "without"
        return [Finding("engine", Level.OK, f"vLLM for the {prepared.kind} is prepared, {model} {DEFAULT_MODEL}")]
    try:
        cache_dir()
        plan_setup(read_host(), "")
    except SetupFailed as error:
        return [Finding("engine", Level.WARNING, error.message.partition("\n")[0], "use --engine sim or --engine-url")]
    return [Finding("engine", Level.OK, "vLLM is not prepared yet: `inferq up` or `inferq setup` does it")]


async def _attached(url: str) -> Finding:
    try:
        async with (
            fleet_session(ASK_LIMIT_S) as session,
            session.get(f"{url.rstrip('/')}/v1/models") as answer,
        ):
            status = answer.status
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        fix = "start that server, or correct --engine-url"
        return Finding("engine", Level.FAILURE, f"{url} does not answer ({error or 'time-out'})", fix)
    if status != 200:
        fix = "give the base URL of an OpenAI-compatible server, and its key as INFERQ_WORKER_ENGINE_API_KEY"
        return Finding("engine", Level.FAILURE, f"{url}/v1/models answers {status}", fix)
    return Finding("engine", Level.OK, f"{url} answers")


async def _router(client: FleetClient, trouble: Level) -> Finding | None:
    """What is wrong with what answers at the Router's URL; None if it is a Router."""
    try:
        metrics = await client.call("GET", "/metrics")
    except RequestFailed as refused:
        if not refused.http_status:
            what, _, fix = refused.message.rpartition(": ")
            return Finding("fabric", trouble, what, fix)
    else:
        if b"inferq" in metrics:
            return None
    return Finding("fabric", trouble, f"what answers at {client.url} is not an inferq Router", "correct --router-url")


async def check_fabric(examined: DoctorTarget) -> list[Finding]:
    """Check the Router, the workers and the pools."""
    async with examined.client as client:
        trouble = Level.FAILURE if examined.router_named else Level.WARNING
        found = await _router(client, trouble)
        if found is not None:
            return [found]
        try:
            fleet, pools = await client.workers(), await client.pools()
        except RequestFailed as refused:
            fix = "" if refused.http_status == 401 else "look at the Manager"
            return [
                Finding(
                    "fabric",
                    trouble,
                    refused.message.removesuffix(f": {CREDENTIALS_ADVICE}"),
                    fix or CREDENTIALS_ADVICE,
                )
            ]
    working = [worker for worker in fleet.workers if worker.takes_work]
    findings = [Finding("fabric", Level.OK, f"{len(working)} of {len(fleet.workers)} workers take work")]
    findings += [
        Finding(
            "fabric",
            Level.WARNING,
            f"{worker.worker_id} is {worker.state}, engine {worker.engine}"
            + ("" if worker.broker_ok else ", and does not reach the queue's Redis"),
            worker.engine_detail,
        )
        for worker in fleet.workers
        if not worker.takes_work
    ]
    findings += [
        Finding(
            "fabric",
            Level.WARNING,
            f"{pool.waiting} requests wait for {pool.model}, which no worker serves",
            "start one",
        )
        for pool in pools
        if pool.waiting and not pool.workers
    ]
    return findings

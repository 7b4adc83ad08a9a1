"""Batches from their record to their files, by real processes."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batches import BatchSettings
from batches.service import serve
from broker import BrokerSettings
from queue_schemas import CannotStart, Tenant
from storage import BatchStatus, StorageSettings
from tests.support.batches import ACME, BatchStorage, add_batcher, line
from tests.support.fleet import Fleet
from tests.support.processes import Child
from tests.support.servers import Cluster, Server, server_binary
from tests.support.waiting import eventually


def rq_info(server: Server) -> str:
    """What `rq info` says."""
    command = [sys.executable, "-c", "from rq.cli import main; main()", "info", "--url", server.url, "--raw"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def url_with_documented_rights(server: Server) -> str:
    """The URL of a user who may do what docs/topologies.md says that a batcher needs, and nothing else."""
    page = (Path(__file__).parents[3] / "docs" / "topologies.md").read_text()
    (found,) = re.findall(r"^ACL SETUSER inferq-batcher (.+)$", page, re.MULTILINE)
    server.ask("ACL", "SETUSER", "inferq-batcher", *found.replace(">PASSWORD", ">secret").split())
    return f"redis://inferq-batcher:secret@127.0.0.1:{server.port}/0"


async def test_two_batchers_run_two_tenants_batches_at_once(tmp_path: Path, own_valkey: Server) -> None:
    """Both advance together, each line is written once, `rq info` shows workers and queue, the pages say what was done,
    and at SIGTERM a batcher ends at once, though a batch runs. The rights in the documents are enough."""
    shelf = BatchStorage(tmp_path / "store")
    globex = Tenant("globex")
    valkey = own_valkey
    url = url_with_documented_rights(valkey)
    async with Fleet(tmp_path, valkey) as fleet:
        first = add_batcher(fleet, shelf, "first", redis_url=url)
        second = add_batcher(fleet, shelf, "second", redis_url=url)
        for batcher in (first, second):
            batcher.process.start()
        await fleet.up(workers=1, slots=8, sim_ttft_ms=5, sim_tokens_per_s=0)
        await second.ready()
        ids = {tenant: shelf.run((line(number) for number in range(600)), tenant) for tenant in (ACME, globex)}

        def both_run() -> bool:
            done = [shelf.batch(ids[tenant], tenant).progress.completed for tenant in ids]
            return min(done) > 50 and max(done) < 600

        await eventually(both_run, "both batches have lines done before either ends", limit_s=20)
        told = rq_info(valkey)
        assert "queue inferq-batches" in told
        assert told.count("worker first.") + told.count("worker second.") == 2
        first.process.send(signal.SIGTERM)
        assert await first.ended(5) == 0
        for tenant, batch_id in ids.items():
            batch = await shelf.ended(batch_id, tenant)
            assert (batch.progress.status, batch.progress.completed) == (BatchStatus.COMPLETED, 600)
            out = shelf.lines(batch.progress.output_file_id, tenant)
            assert sorted(one["custom_id"] for one in out) == sorted(f"line-{number}" for number in range(600))
        assert 'inferq_batch_step_seconds_count{phase="dispatch"}' in await second.metrics()

        async def none_live() -> bool:
            return "inferq_batches_live 0.0" in await second.metrics()

        await eventually(none_live, "no batch is live")
        assert rq_info(valkey).count("worker first.") == 0
        refused = {bytes(entry[b"object"]) for entry in valkey.ask("ACL", "LOG")}
        assert refused <= {b"config|get"}, "more than what only serves a warning was refused"


async def test_a_batch_runs_over_a_cluster(tmp_path: Path, valkey: Server) -> None:
    """RQ's jobs lie in a plain Redis beside it, lines on their model's shard; the Manager says where the cluster is."""
    binary = server_binary()
    shelf = BatchStorage(tmp_path / "store")
    cluster = Cluster(binary, tmp_path / "cluster")
    try:
        fleet = Fleet(tmp_path, cluster.start(), manager={"shards": 3})
        async with fleet:
            add_batcher(
                fleet, shelf, redis_url="", manager_url=fleet.manager.url, rq_redis_url=valkey.url
            ).process.start()
            batch_id = shelf.run(line(number) for number in range(300))
            await fleet.up(workers=1, slots=8, sim_ttft_ms=0, sim_tokens_per_s=0)
            batch = await shelf.ended(batch_id)
        out = shelf.lines(batch.progress.output_file_id)
        assert sorted(one["custom_id"] for one in out) == sorted(f"line-{number}" for number in range(300))
    finally:
        cluster.stop()


async def test_a_full_disk_is_waited_for(tmp_path: Path, valkey: Server) -> None:
    """While the store takes no more, the batch stands still and /readyz says why; with room it ends whole."""
    shelf = BatchStorage(tmp_path / "store")
    async with Fleet(tmp_path, valkey) as fleet:
        batcher = add_batcher(fleet, shelf)
        # Writes refused for size are errors to it, as those refused for space are.
        batcher.process = Child("batcher", ["sh", "-c", 'trap "" XFSZ; exec "$@"', "sh", *batcher.process.args],
                                tmp_path / "batcher.log", env=dict(os.environ), cwd=tmp_path)  # fmt: skip
        batcher.process.start()
        await fleet.up(workers=1, slots=8, sim_ttft_ms=2, sim_tokens_per_s=0)
        await batcher.ready()
        batch_id = shelf.run(line(number) for number in range(1_000))
        await shelf.done(batch_id, 100)
        limit_files(batcher.process.pid, 200)

        async def says_why() -> bool:
            status, body = await batcher.get("/readyz")
            return status == 503 and b"no room" in body

        await eventually(says_why, "the batcher says that the store is full", limit_s=15)
        assert shelf.batch(batch_id).progress.status is BatchStatus.IN_PROGRESS
        limit_files(batcher.process.pid, None)
        batch = await shelf.ended(batch_id)
        assert (batch.progress.completed, batch.progress.failed) == (1_000, 0)
        assert len({one["custom_id"] for one in shelf.lines(batch.progress.output_file_id)}) == 1_000
        await batcher.ready()


def limit_files(pid: int, max_bytes: int | None) -> None:
    """From now on no file that the process writes may be larger."""
    limit = resource.RLIM_INFINITY if max_bytes is None else max_bytes
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


async def test_wrong_settings_are_one_sentence(tmp_path: Path) -> None:
    """A cluster without a Redis for RQ, or no queue at all: what to set."""
    store = StorageSettings(url=str(tmp_path))
    for url, says in (("redis+cluster://127.0.0.1:1", "INFERQ_BROKER_RQ_REDIS_URL"), ("", "INFERQ_REDIS_URL")):
        with pytest.raises(ExceptionGroup) as told:
            await serve(BatchSettings(port=0), BrokerSettings(redis_url=url), store, stop=asyncio.Event())
        assert told.group_contains(CannotStart, match=says)

"""The parent of several processes, with processes that are scripts: restarts, hangs, its end, what forking shares."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.processes import Child, environment

ROOT = Path(__file__).parents[4]
_BEGIN = """
import asyncio, os, signal, sys, time
from queue_schemas import InferqError
from queue_schemas.ids import new_job_id, new_session_id
from router.processes import supervisor
from router.processes.sibling_link import SiblingLink
from storage.names import new_file_id
from telemetry import MetricsRegistry, backoff, configure_logging
from telemetry.http.request_context import new_request_id
from telemetry.http.server import bind_socket, exit_code_of, run_loop
backoff._RESTART_BACKOFF = backoff.Backoff(0.01, 0.02)
configure_logging("router", "info", "json")

def say(*words):  # a line at once: a handler of a signal may say something in the middle
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def serve(number, channel, work=None):
    link = SiblingLink(number, channel)
    async def run():
        stop = asyncio.Event()
        await link.open()
        running = asyncio.create_task(link.run(MetricsRegistry("router"), stop, asyncio.Event()))
        link.ready()
        say("runs", number, os.getpid())
        if work is not None:
            await work(link)
        await stop.wait()
        say("stops", number)
        running.cancel()
        await asyncio.wait((running,))
    return exit_code_of(lambda: run_loop(run), link.refuse)

def run(run_child, count=2, stop_limit_s=5.0):
    parent = supervisor.Supervisor(
        count, bind_socket("127.0.0.1", 0), run_child, lambda number: None, stop_limit_s=stop_limit_s
    )
    sys.exit(exit_code_of(parent.run))
"""
Script = Callable[[str], Child]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """Run a script behind ``_BEGIN``; it ends with the test."""
    made: list[Child] = []

    def start(text: str) -> Child:
        env = environment(PYTHONPATH=str(ROOT))
        made.append(Child("parent", [sys.executable, "-c", _BEGIN + text], tmp_path / "log", env=env, cwd=tmp_path))
        made[-1].start()
        return made[-1]

    yield start
    for child in made:
        child.kill_group()


def lines(child: Child, begin: str) -> list[str]:
    return [line for line in child.log_text().splitlines() if line.startswith(begin)]


def test_a_process_that_ends_again_and_again_ends_the_router(script: Script) -> None:
    """After eight ends in a row the others are stopped in good order, and the parent says why it gives up."""
    child = script("run(lambda number, channel: 7 if number == 1 else serve(number, channel))")
    assert child.wait(20) == 2, child.log_tail()
    (said,) = lines(child, "inferq: ")
    assert "process 1 of the router cannot be kept running: it ended 8 times in a row, at last with code 7" in said
    assert lines(child, "stops 2")


def test_a_process_that_never_answers_is_replaced(script: Script) -> None:
    """One whose loop hangs accepts nothing and answers no orders: it is killed, and a successor runs."""
    child = script("""
supervisor.COLLECT_INTERVAL_S = 0.1
async def hang_once(link):
    if not os.path.exists("hung"):
        open("hung", "w").close()
        time.sleep(60)
run(lambda number, channel: serve(number, channel, hang_once), count=1)
""")
    child.until(lambda: len(lines(child, "runs 1")) == 2, 30)
    assert '"process_hangs"' in child.log_text()
    assert child.terminate() == 0


def test_a_process_that_does_not_stop_is_killed(script: Script) -> None:
    """SIGTERM ends the Router within its limit, whatever a process does."""
    child = script("""
async def hang(link):
    time.sleep(60)
run(lambda number, channel: serve(number, channel, hang), stop_limit_s=0.3)
""")
    child.until(lambda: len(lines(child, "runs")) == 2, 30)
    assert child.terminate(5) == 0
    assert '"processes_killed"' in child.log_text()


def test_a_third_signal_ends_all_at_once(script: Script) -> None:
    """A process that hangs holds up no operator who insists."""
    child = script("""
async def hang(link):
    time.sleep(60)
run(lambda number, channel: serve(number, channel, hang), stop_limit_s=60)
""")
    child.until(lambda: len(lines(child, "runs")) == 2, 30)
    for event in ("stopping", "stopping_without_delay", "stopped_at_once"):
        child.send(signal.SIGTERM)
        if event != "stopped_at_once":
            child.until(lambda event=event: f'"{event}"' in child.log_text(), 5)  # type: ignore[misc]
    assert child.wait(5) == 0
    assert '"stopped_at_once"' in child.log_text()


def test_a_scrape_does_not_wait_for_a_process_that_hangs(script: Script) -> None:
    """Its last known figures count instead."""
    child = script("""
async def work(link):
    if link.number == 1:
        time.sleep(60)
    began = time.monotonic()
    merged = await link.merged(MetricsRegistry("router"))
    say("merged", len(merged) > 0, time.monotonic() - began < 2.5)
run(lambda number, channel: serve(number, channel, work))
""")
    child.until(lambda: bool(lines(child, "merged")), 30)
    assert lines(child, "merged") == ["merged True True"]


def test_forked_processes_draw_different_ids(script: Script) -> None:
    """Nothing that ids are made of is drawn before the fork."""
    child = script("""
async def draw(link):
    for made in (new_job_id(0), new_session_id("router"), new_request_id(), new_file_id(0)):
        say("drawn", made)
run(lambda number, channel: serve(number, channel, draw), count=3)
""")
    child.until(lambda: len(lines(child, "drawn")) == 12, 30)
    assert len(set(lines(child, "drawn"))) == 12
    assert child.terminate() == 0


def test_a_hangup_stops_all_in_order_and_never_hurries(script: Script) -> None:
    """However many tell of one hangup, the processes leave their terminal and stop once; nothing is hurried."""
    child = script("""
from router.processes import sibling_link
sibling_link.leave_terminal = lambda: say("left the terminal")
signal.signal(signal.SIGHUP, signal.SIG_DFL)
async def linger(link):
    await asyncio.sleep(1)
run(lambda number, channel: serve(number, channel, linger))
""")
    child.until(lambda: len(lines(child, "runs")) == 2, 30)
    for _ in range(2):
        child.send(signal.SIGHUP)
        child.until(lambda: len(lines(child, "left the terminal")) >= 2, 20)
    assert child.wait(10) == 0
    assert len(lines(child, "stops")) == 2
    assert '"stopping_without_delay"' not in child.log_text()


def test_a_fork_that_fails_is_tried_again(script: Script) -> None:
    """A machine short of memory or process ids costs a pause, not the Router."""
    child = script("""
fork, failures = os.fork, [OSError("Resource temporarily unavailable")]
def fork_later():
    if failures:
        raise failures.pop()
    return fork()
os.fork = fork_later
run(serve)
""")
    child.until(lambda: len(lines(child, "runs")) == 2, 30)
    assert '"process_not_started"' in child.log_text()
    assert child.terminate() == 0

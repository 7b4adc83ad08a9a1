"""Start and drain workers by the depth of one model's queue, from none and back to none.

    python examples/autoscale_by_queue_depth.py --model Qwen/Qwen3-8B --max-workers 4 -- \
        inferq worker --manager-url http://127.0.0.1:18000 --model Qwen/Qwen3-8B

The command after ``--`` starts one worker; the script adds ``--worker-id`` and ``--port 0``. Once per interval it wants
one worker for every ``--per-worker`` requests that wait or run, between ``--min-workers`` and ``--max-workers``. It
starts missing workers at once. It drains one worker at a time, after the queue has needed fewer for the whole cooldown.
A drained worker (SIGTERM) takes nothing new and finishes what it runs. Requests for a model without workers wait in the
queue if the Router knows the model: a worker served it within a day, or ``INFERQ_ROUTER_POOLS`` names it.

The script needs nothing but Python. Copy it and change the two lines that start and stop a worker to your platform's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

ASK_LIMIT_S = 5.0
DRAIN_LIMIT_S = 60.0


HINTS = {401: "set INFERQ_API_KEY or INFERQ_JOIN_TOKEN, as the Router asks", 503: "the queue cannot be reached now"}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take the API key to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
"""Calls the Router directly, whatever HTTP_PROXY says."""


class DepthUnknown(Exception):
    """The queue depth is unknown, for the reason in the message. Scaling should change nothing then."""


def outstanding(router_url: str, model: str) -> int:
    """Requests that wait or run for ``model``. Raises ``DepthUnknown``.

    A Router with API keys wants one, or the join token: ``INFERQ_API_KEY``, ``INFERQ_JOIN_TOKEN``.
    """
    url = f"{router_url}/fabric/v1/pools/{urllib.parse.quote(model)}"
    request = urllib.request.Request(url)
    if "INFERQ_API_KEY" in os.environ:
        request.add_header("authorization", f"Bearer {os.environ['INFERQ_API_KEY']}")
    if "INFERQ_JOIN_TOKEN" in os.environ:
        request.add_header("x-inferq-join-token", os.environ["INFERQ_JOIN_TOKEN"])
    try:
        with DIRECT.open(request, timeout=ASK_LIMIT_S) as answer:
            return int(json.load(answer)["outstanding"])
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return 0
        raise DepthUnknown(f"{url} answers {error.code}: {HINTS.get(error.code, error.reason)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DepthUnknown(f"{router_url} is not an inferq Router: check --router-url") from error
    except OSError as error:
        raise DepthUnknown(f"no Router answers at {router_url}: {getattr(error, 'reason', error)}") from error


class Fleet:
    """The workers that this script started. Draining workers do not count, but the script waits for them."""

    def __init__(self, command: list[str], name: str) -> None:
        self._command = command
        self._name = name
        self._started = 0
        self.working: list[subprocess.Popen[bytes]] = []
        self._draining: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._started += 1
        identity = ["--worker-id", f"{self._name}-{os.getpid()}-{self._started}", "--port", "0"]
        self.working.append(subprocess.Popen([*self._command, *identity], start_new_session=True))

    def drain(self) -> None:
        worker = self.working.pop()
        worker.send_signal(signal.SIGTERM)
        self._draining.append(worker)

    def reap(self) -> None:
        """Forget workers that have ended, for whatever reason; the rule starts others if needed."""
        self.working = [worker for worker in self.working if worker.poll() is None]
        self._draining = [worker for worker in self._draining if worker.poll() is None]

    def end(self) -> None:
        """Drain all workers; kill those that do not end within the limit."""
        while self.working:
            self.drain()
        limit = time.monotonic() + DRAIN_LIMIT_S
        for worker in self._draining:
            try:
                worker.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def scale(options: argparse.Namespace, fleet: Fleet, stop: threading.Event) -> None:
    """Follow the queue until ``stop`` is set."""
    enough_since: float | None = None
    trouble = ""
    while not stop.wait(options.interval_s):
        fleet.reap()
        try:
            jobs = outstanding(options.router_url, options.model)
        except DepthUnknown as error:
            if trouble != str(error):
                print(f"cannot read the queue depth, so nothing changes: {error}", file=sys.stderr, flush=True)
            trouble = str(error)
            continue
        if trouble:
            print("the Router answers again", file=sys.stderr, flush=True)
            trouble = ""
        wanted = min(options.max_workers, max(options.min_workers, math.ceil(jobs / options.per_worker)))
        running = len(fleet.working)
        if wanted >= running:
            enough_since = None
            for _ in range(wanted - running):
                fleet.start()
        else:
            enough_since = enough_since or time.monotonic()
            if time.monotonic() - enough_since >= options.cooldown_s:
                fleet.drain()
                enough_since = time.monotonic() if len(fleet.working) > wanted else None
        if len(fleet.working) != running:
            print(f"{jobs} requests: {running} -> {len(fleet.working)} workers", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Start and drain workers by queue depth.")
    parser.add_argument("--router-url", default="http://127.0.0.1:18000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--min-workers", type=int, default=0, help="workers that always run")
    parser.add_argument("--max-workers", type=int, default=4, help="workers that run at most")
    parser.add_argument("--per-worker", type=int, default=16, help="requests that justify one worker")
    parser.add_argument("--interval-s", type=float, default=1.0)
    parser.add_argument("--cooldown-s", type=float, default=60.0)
    parser.add_argument("command", nargs="+", help="how to start one worker, after --")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    fleet = Fleet(options.command, "auto")
    try:
        scale(options, fleet, stop)
    finally:
        fleet.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())

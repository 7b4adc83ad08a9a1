"""Start and drain workers by the depth of one model's queue, from none and back to none.

    python examples/autoscale_by_queue_depth.py --model Qwen/Qwen3-8B --most 4 -- \
        inferq worker --manager-url http://127.0.0.1:18000 --model Qwen/Qwen3-8B

What follows ``--`` starts one worker; ``--worker-id`` and ``--port 0`` are added. The rule, once per interval: one
worker for every ``--per-worker`` requests that wait or run, within ``--least`` and ``--most``; more at once, fewer only
after the queue has asked for fewer during the whole cooldown, one at a time. A worker that is drained (SIGTERM) takes
nothing new and finishes what it runs. Requests for a model at zero workers wait in the queue, if the Router knows the
model: a worker served it within a day, or ``INFERQ_ROUTER_POOLS`` names it.

It needs nothing but Python: copy it and change the two lines that start and end a worker to whatever you run them on.
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
    """A redirect would take the API key with it to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
"""The fleet is never asked by way of a proxy, whatever HTTP_PROXY says."""


class CannotAsk(Exception):
    """Nobody can tell how much waits, for the reason that it names: then nothing should change."""


def outstanding(router_url: str, model: str) -> int:
    """Requests that wait or run for ``model``. Raises ``CannotAsk``.

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
        raise CannotAsk(f"{url} answers {error.code}: {HINTS.get(error.code, error.reason)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CannotAsk(f"what answers at {router_url} is no inferq Router: check --router-url") from error
    except OSError as error:
        raise CannotAsk(f"no Router answers at {router_url}: {getattr(error, 'reason', error)}") from error


class Fleet:
    """The workers that this script started. Those that drain do not count, but are waited for."""

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
        """Forget those that have ended, however they did: the rule starts others if they are needed."""
        self.working = [worker for worker in self.working if worker.poll() is None]
        self._draining = [worker for worker in self._draining if worker.poll() is None]

    def end(self) -> None:
        """Drain all of them; kill what has not ended within the limit."""
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
        except CannotAsk as error:
            if trouble != str(error):
                print(f"cannot ask, so nothing changes: {error}", file=sys.stderr, flush=True)
            trouble = str(error)
            continue
        if trouble:
            print("the Router answers again", file=sys.stderr, flush=True)
            trouble = ""
        wanted = min(options.most, max(options.least, math.ceil(jobs / options.per_worker)))
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
    parser.add_argument("--least", type=int, default=0, help="workers that always run")
    parser.add_argument("--most", type=int, default=4, help="workers at most")
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

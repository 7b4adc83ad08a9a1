#!/usr/bin/env python3
"""A worker without dependencies: takes jobs from a Router, runs them on the engine beside it (docs/worker-protocol.md).

ROUTER_URL (several with commas between), ENGINE_URL, WORKER_KEY, WORKER_ID, WORKER_SLOTS say where and who.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

ROUTERS = os.environ["ROUTER_URL"].split(",")
ENGINE = urlsplit(os.environ["ENGINE_URL"]).netloc
NAME = os.environ.get("WORKER_ID") or re.sub(r"[^A-Za-z0-9_.-]+", "-", socket.gethostname()).strip("-._")[:63]
SLOTS = int(os.environ.get("WORKER_SLOTS", "4"))
HEADERS = {"content-type": "application/json", "authorization": f"Bearer {os.environ.get('WORKER_KEY', '')}"}
PIECE_BYTES = 4 << 20
DRAIN_S = 30.0
BROKEN = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError)
"""What reading from the other side raises if it breaks off, or says what is no message."""
stopping = threading.Event()


class Unanswered(Exception):
    """The Router did not answer: ask again."""


class Refused(Exception):
    """It answered, and the answer will not change by asking again. ``args``: its code."""


def ask_once(path: str, message: Any = None, *, method: str = "POST", hold_s: float = 0.0) -> Any:
    """One call to the Router in use; if it does not answer, the next one is used from then on."""
    url = urlsplit(ROUTERS[0])
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.netloc, timeout=15.0 + hold_s)
    try:
        body = None if message is None else json.dumps(message)
        connection.request(method, f"{url.path}/worker/v1/sessions{path}", body, HEADERS)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status < 300:
            return json.loads(content) if content else {}
        code = json.loads(content)["error"]["code"] if answer.status < 500 else ""
    except BROKEN as error:
        ROUTERS.append(ROUTERS.pop(0))
        raise Unanswered(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if answer.status in (401, 429) or answer.status >= 500:
        raise Unanswered(f"{answer.status} {content[:200]!r}")
    raise Refused(code)


def ask(path: str, message: Any) -> Any:
    """The same until it is answered: no call does anything twice."""
    pause_s = 0.1
    while True:
        try:
            return ask_once(path, message)
        except Unanswered:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)


class Attempt(threading.Thread):
    """Runs one job."""

    def __init__(self, session: Session, job: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.session, self.job, self.lease = session, job, job["lease"]
        self.seq, self.stopped, self.began = 0, "", time.monotonic()
        self.head: dict[str, Any] = {}
        self.engine = http.client.HTTPConnection(ENGINE, timeout=job["remaining_ms"] / 1000 + 5)

    def stop(self, why: str) -> None:
        """End it, at the engine too. ``why`` is handed_back if the job is still ours."""
        self.stopped = self.stopped or why
        if self.engine.sock is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self.engine.sock.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        try:
            reason = self.answer()
            if self.stopped == "handed_back" or (reason and not self.stopped):
                kind = self.stopped or "spent"
                self.session.spent_at = time.monotonic()
                self.tell("release", {"kind": kind, "reason": reason or "its worker stops"})
        except Refused as refusal:
            self.session.refused(refusal)
        finally:
            self.engine.close()
            self.session.attempts.pop(self.lease, None)
            self.session.changed.set()

    def answer(self) -> str:
        """Ask the engine, and pass its answer on. Why the job has to run again; empty if it need not."""
        job = self.job
        body = base64.b64decode(job["body"]) if job.get("encoding") == "base64" else job["body"].encode()
        headers = {"content-type": job["content_type"], **(job.get("headers") or {})}
        try:
            self.engine.request("POST", job["path"], body, headers)
            if self.stopped:  # before there was a connection to close
                return ""
            answer = self.engine.getresponse()
            kind = answer.headers.get("content-type", "application/octet-stream")
            self.head = {"status": answer.status, "content_type": kind}
            if answer.status >= 500 and job["attempt"] < job["max_attempts"]:
                return f"the engine answered {answer.status}"
            is_stream = job["stream"] and answer.status < 400 and kind.startswith("text/event-stream")
            whole = b"" if is_stream else answer.read()
            if not is_stream and kind.startswith("application/json"):
                json.loads(whole)  # what says so and is none is broken
            rest = self.relay(answer) if is_stream else self.pieces(whole)
        except BROKEN as error:
            return f"the engine broke off: {type(error).__name__}: {error}"
        if rest is not None and not self.stopped:
            outcome = "done" if answer.status < 400 else "failed"
            run_ms = round((time.monotonic() - self.began) * 1000)
            self.tell("settle", {**self.piece(rest), "outcome": outcome, "run_ms": run_ms})
        return ""

    def relay(self, answer: http.client.HTTPResponse) -> bytes | None:
        """Send a stream while it comes. A job with a prefix begins anew: the Router compares. None: it was stopped."""
        events, last = b"", b""
        while data := answer.read1(1 << 16):
            events = (events + data).replace(b"\r\n", b"\n")
            end = events.rfind(b"\n\n") + 2
            if end > 1:
                last, events = events[:end], events[end:]
                if not self.send(last):
                    return None
        if "completions" in self.job["path"] and b"data: [DONE]" not in last + events:
            raise ValueError("the stream ended before its end marker")
        return events

    def pieces(self, whole: bytes) -> bytes | None:
        """Send all but the last piece of a large answer, and answer that one."""
        while len(whole) > PIECE_BYTES:
            if not self.send(whole[:PIECE_BYTES]):
                return None
            whole = whole[PIECE_BYTES:]
        return whole

    def send(self, data: bytes) -> bool:
        """Send a piece until it is taken: meanwhile the engine is not read. False: nobody takes it."""
        while not self.stopped:
            found = self.tell("output", self.piece(data))
            if found == "ok":
                self.seq += 1
                return True
            if found == "full":
                time.sleep(0.25)
            else:
                self.stop("handed_back" if found == "gone" else found)
        return False

    def piece(self, data: bytes) -> dict[str, Any]:
        """A piece of the answer, as the protocol has it."""
        part: dict[str, Any] = {"seq": self.seq, **({} if self.seq else {"head": self.head})}
        try:
            return {**part, "data": [data.decode()]}
        except UnicodeDecodeError:
            return {**part, "data": [base64.b64encode(data).decode()], "encoding": "base64"}

    def tell(self, name: str, message: dict[str, Any]) -> str:
        """Say something of this attempt; what it is answered."""
        found = ask(f"/{self.session.id}/{name}", {"attempts": [{"lease": self.lease, **message}]})
        return str(found["answers"][0])


class Session:
    """One session: from its join until it has drained, or was declared dead."""

    def __init__(self, models: list[str]) -> None:
        self.id = f"{NAME}.{secrets.token_hex(8)}"
        self.models = models
        self.attempts: dict[str, Attempt] = {}
        self.pools: list[dict[str, Any]] = []
        self.changed, self.ping, self.over = threading.Event(), threading.Event(), threading.Event()
        self.seq, self.turn, self.after, self.spent_at = 0, 0, "0", -10.0

    def run(self) -> None:
        """Work until stopping or over."""
        interval_s = self.join(again=False)
        threading.Thread(target=self.keep, args=(interval_s,), daemon=True).start()
        failed = False
        while not self.over.is_set() and not (stopping.is_set() and not self.attempts):
            free = 0 if stopping.is_set() else SLOTS - len(self.attempts)
            claim = free > 0 and bool(self.pools)
            if claim and not failed:
                self.seq += 1
            try:
                self.poll(free if claim else 0, claim=claim)
                if failed:
                    self.reconcile()
                failed = False
            except (Unanswered, *BROKEN) as error:
                print(f"the router did not answer: {error}", file=sys.stderr)
                failed = True
                time.sleep(0.3)
            except Refused as refusal:
                self.refused(refusal)
        self.over.set()

    def status(self) -> dict[str, Any]:
        running = len(self.attempts)
        return {"session_id": self.id, "models": self.models, "slots": SLOTS, "running": running, "engine": "ready"}

    def join(self, *, again: bool) -> float:
        """Join; the seconds between heartbeats."""
        found = ask("", {**self.status(), "worker_id": NAME, "again": again})
        self.pools = found["assignment"]["pools"]
        return float(found["heartbeat_interval_ms"]) / 1000

    def keep(self, interval_s: float) -> None:
        """Send heartbeats, and one at once at a ping."""
        while not self.over.is_set():
            self.ping.wait(interval_s)
            self.ping.clear()
            try:
                found = ask_once(f"/{self.id}/heartbeat", self.status())
                self.pools = found["assignment"]["pools"]
                if found.get("drain"):
                    stopping.set()
            except (Unanswered, *BROKEN):
                time.sleep(0.1)
            except Refused as refusal:
                if refusal.args == ("unknown_worker",):
                    self.join(again=True)
                else:
                    self.refused(refusal)

    def poll(self, n: int, *, claim: bool) -> None:
        """Claim and listen: long while nothing runs, else briefly, as slots become free."""
        # A job whose attempt was spent here comes back after 2 s, and nothing wakes us for it.
        busy = self.attempts or stopping.is_set() or time.monotonic() - self.spent_at < 4.0
        hold_s = 0.3 if busy else 20.0
        shard = self.pools[0]["shard"] if self.pools else 0
        message: dict[str, Any] = {"shard": shard, "after": self.after, "wait_ms": int(hold_s * 1000)}
        if claim:
            pools = [{"pool": one["pool"], "lanes": one["lanes"]} for one in self.pools if one["shard"] == shard]
            message["claim"] = {"seq": self.seq, "turn": self.turn, "n": min(n, 32), "pools": pools}
        found = ask_once(f"/{self.id}/claim", message, hold_s=hold_s)
        jobs = list((found.get("claimed") or {}).get("jobs", ()))
        self.turn += len(jobs)
        for job in jobs:
            if job["lease"] not in self.attempts:
                self.attempts[job["lease"]] = attempt = Attempt(self, job)
                attempt.start()
        for told in found["messages"]:
            self.after = told["id"]
            if told["kind"] == "ping":
                self.ping.set()
            elif told["kind"] == "drain":
                stopping.set()
            elif told["kind"] == "abort":
                for running in list(self.attempts.values()):
                    if running.job["job_id"] == told["job_id"]:
                        running.stop("aborted")

    def reconcile(self) -> None:
        """Say what runs here, after the queue may have forgotten it."""
        shard = self.pools[0]["shard"] if self.pools else 0
        leases = list(self.attempts)
        found = ask_once(
            f"/{self.id}/reconcile", {"shard": shard, "after": self.after, "seq": self.seq, "leases": leases}
        )
        for lease in found["lost"]:
            if (attempt := self.attempts.get(lease)) is not None:
                attempt.stop("lost")

    def refused(self, refusal: Refused) -> None:
        """A call was refused for good: the session is dead, or this worker is wrong."""
        print(f"refused: {refusal.args[0]}", file=sys.stderr)
        if refusal.args != ("fenced",):
            os._exit(1)
        self.over.set()
        for attempt in list(self.attempts.values()):
            attempt.stop("fenced")


def engine_models() -> list[str]:
    """What the engine serves, waited for."""
    while not stopping.is_set():
        try:
            engine = http.client.HTTPConnection(ENGINE, timeout=10)
            engine.request("GET", "/v1/models")
            return [one["id"] for one in json.loads(engine.getresponse().read())["data"]]
        except BROKEN as error:
            print(f"the engine does not answer: {error}", file=sys.stderr)
            time.sleep(1.0)
    return []


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    models = engine_models()
    while not stopping.is_set():
        session = Session(models)
        worker = threading.Thread(target=session.run)
        worker.start()
        while not session.over.wait(0.2) and not stopping.is_set():
            pass
        worker.join(DRAIN_S if stopping.is_set() else 1.0)
        for attempt in list(session.attempts.values()):
            attempt.stop("handed_back")
            attempt.join(5.0)
        if stopping.is_set():
            ask_once(f"/{session.id}", method="DELETE")


if __name__ == "__main__":
    main()

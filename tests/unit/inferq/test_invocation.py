"""Commands without a terminal: pipes, closed output, ignored signals; and tables that fit."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest

from inferq.tables import Column, Row, fitted_table, output_width, print_table
from openai_api.pages import page_of

JOB_ID = "0-fa8cc2b448c3e9a6e7b26c33c7ecd53c"
JOB = {
    "id": JOB_ID,
    "object": "job",
    "status": "completed",
    "model": "a-model-with-a-rather-long-name-of-some-organisation/and-its-repository",
    "path": "/v1/chat/completions",
    "created_at": 1_700_000_000,
    "ended_at": 1_700_000_005,
    "attempts": 1,
}
ENDPOINT = {
    "id": "we_0123456789abcdef0123456789abcdef",
    "object": "webhook_endpoint",
    "url": "https://hooks.example.com/a/rather/long/path/that/goes/on/and/on",
    "event_types": ["batch.completed", "batch.failed"],
    "status": "enabled",
    "name": "a name",
    "created_at": 1_700_000_000,
}
LETTER = {
    "id": "0:1700000000000-0",
    "job_id": JOB_ID,
    "at_ms": 1_700_000_000_000,
    "model": "m" * 40,
    "tenant": "t" * 30,
    "lane": "batch",
    "cause": "the engine crashed " * 5,
    "worker": "worker-with-a-long-name",
    "attempts": 3,
    "size_bytes": 99,
}
POOLS = {"pools": [{"model": "sim", "workers": 1, "slots": 4}]}
PAGES: dict[str, Any] = {
    "/metrics": "inferq_up 1",
    "/v1/jobs": page_of([JOB] * 3, has_more=False),
    "/v1/webhook_endpoints": page_of([ENDPOINT] * 3, has_more=False),
    "/fabric/v1/dead": {"letters": [LETTER] * 3, "next": ""},
    "/fabric/v1/pools": POOLS,
}


class _Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        page = PAGES.get(self.path.partition("?")[0])
        body = page.encode() if isinstance(page, str) else orjson.dumps(page)
        self.send_response(200 if page else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *parts: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that answers as a Router with a few jobs, endpoints and dead letters."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def _start(arguments: list[str], url: str, *, script: str = 'exec "$@"', **env: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("INFERQ_", "COLUMNS"))}
    return subprocess.Popen(
        ["sh", "-c", script, "sh", sys.executable, "-m", "inferq", *arguments],
        env=clean | {"INFERQ_ROUTER_URL": url, "PYTHONPATH": str(Path(__file__).parents[3])} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _line(process: subprocess.Popen[str], limit_s: float = 60) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], limit_s)[0], "no output"
    return process.stdout.readline()


LISTS = [["jobs", "list"], ["webhooks", "list"], ["dead", "list"]]
IDS = [JOB_ID, ENDPOINT["id"], LETTER["id"]]


@pytest.mark.parametrize(("command", "shown"), list(zip(LISTS, IDS, strict=True)), ids=lambda one: str(one[0]))
def test_a_piped_list_is_whole_and_a_narrow_one_keeps_its_ids(command: list[str], shown: str, url: str) -> None:
    """[F6] Piped: every cell, no colours. COLUMNS=50: fewer columns, the same ids, no wider than that."""
    piped, _ = _start(command, url).communicate(timeout=60)
    assert len(piped.splitlines()) == 4
    for line in piped.splitlines()[1:]:
        assert shown in line.split()
        assert len(line) > 80
    assert "\x1b" not in piped
    narrow, _ = _start(command, url, COLUMNS="50").communicate(timeout=60)
    assert len(narrow.splitlines()) == 4
    assert all(shown in line.split() and len(line) <= 50 for line in narrow.splitlines()[1:])


def test_every_setting_is_whole_when_piped(url: str) -> None:
    """[F6] ``inferq config`` gives a line for each setting, with its variable and meaning in it."""
    piped, errors = _start(["config", "router"], url).communicate(timeout=60)
    lines = {line.split()[0]: line for line in piped.splitlines() if line.strip()}
    assert "INFERQ_ROUTER_MANAGER_URLS" in lines["manager_urls"], errors
    assert "\x1b" not in piped
    assert "…" not in piped
    assert all(line == line.rstrip() for line in piped.splitlines())


def test_a_table_drops_the_least_important_columns_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """[F6] Long texts are shortened, then columns go by rank; ids stay however narrow it is."""
    columns = [Column("ID"), Column("NOTE", 1, shrinks=True), Column("LEAST", 3), Column("MORE", 2)]
    rows = [Row(("id-0123456789", "a note that is long", "least", "more"))]
    expected = {60: 4, 40: 4, 33: 3, 27: 2, 20: 1, 5: 1}
    for width, left in expected.items():
        assert len(fitted_table(columns, rows, width).columns) == left, width
    monkeypatch.setenv("COLUMNS", "5")
    assert output_width() == 5
    print_table(columns, rows)
    assert "id-0123456789" in capsys.readouterr().out


def test_watching_without_a_terminal_shows_a_table_a_look(url: str) -> None:
    """[F5] Each look is there at once, though standard output is a pipe; Ctrl-C ends it with 130 and no traceback."""
    watch = _start(["queues", "--watch", "--interval", "0.1"], url)
    for _ in range(3):
        assert _line(watch).startswith("MODEL")
        assert _line(watch).startswith("sim")
        assert _line(watch) == "\n"
    watch.send_signal(signal.SIGINT)
    _, errors = watch.communicate(timeout=30)
    assert (watch.returncode, errors) == (130, "")


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_watching_ends_soon_after_its_reader(more: list[str], url: str) -> None:
    """[F5] ``| head -1`` ends it long before the next look, without a word."""
    watch = _start(["queues", "--watch", "--interval", "3600", *more], url)
    assert _line(watch)
    assert watch.stdout is not None and watch.stderr is not None
    watch.stdout.close()
    assert watch.wait(timeout=30) == 141
    assert watch.stderr.read() == ""
    watch.stderr.close()


@pytest.mark.parametrize("command", [["jobs", "list"], ["config"], ["queues", "--json"]], ids="-".join)
def test_no_command_minds_a_reader_who_has_left(command: list[str], url: str) -> None:
    """[F5] Each ends as a shell shows a program that SIGPIPE ended; where output is closed or full, in a sentence."""
    gone = _start(command, url, script='exec "$@"')
    assert gone.stdout is not None and gone.stderr is not None
    gone.stdout.close()
    assert (gone.wait(timeout=60), gone.stderr.read()) == (141, "")
    gone.stderr.close()
    closed = _start(command, url, script='exec "$@" >&-')
    assert (closed.communicate(timeout=60)[1], closed.returncode) == ("", 0)
    full = _start(command, url, script='exec "$@" >/dev/full')
    errors = full.communicate(timeout=60)[1]
    assert (full.returncode, errors.count("\n")) == (2, 1), errors
    assert "No space left on device" in errors


def test_ctrl_c_works_though_the_parent_ignores_it(url: str) -> None:
    """[G13] A parent that ignores SIGINT, or blocks it, does not take Ctrl-C from a command that promises it."""
    for blocked in (False, True):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM) if blocked else ())
        try:
            watch = _start(["queues", "--watch", "--interval", "0.1"], url, script='trap "" INT; exec "$@"')
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert _line(watch)
        watch.send_signal(signal.SIGINT)
        watch.communicate(timeout=30)
        assert watch.returncode == 130


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_blank_variable_of_a_commands_option_is_unset(blank: str, url: str) -> None:
    """[H34] INFERQ_ROUTER_URL, INFERQ_CONFIG and the like count as unset where a template left them blank."""
    names = ("INFERQ_CONFIG", "INFERQ_API_KEY", "INFERQ_JOIN_TOKEN", "INFERQ_DATA_DIR", "INFERQ_REDIS_URL")
    process = _start(["queues"], url, **dict.fromkeys(names, blank))
    assert process.communicate(timeout=60)[0].startswith("MODEL")
    process = _start(["queues"], url, INFERQ_ROUTER_URL=blank)
    said = process.communicate(timeout=60)[1] or ""
    assert "does not begin with" not in said
    assert process.returncode in (0, 2)  # whether or not a Router runs at the default address


def test_an_argument_that_is_no_text_is_a_sentence(url: str) -> None:
    """[H35] Bytes that are no text of the terminal's encoding cannot be asked or sent: exit code 2, no traceback."""
    environment = {**os.environ, "INFERQ_ROUTER_URL": url}
    for arguments in (["chat", "-m", "m", b"caf\xe9"], ["webhooks", "add", b"https://a.example/\xe9"]):
        command = [sys.executable, "-m", "inferq", *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
        assert ended.returncode == 2
        assert b"is not text in utf-8" in ended.stderr
        assert b"Traceback" not in ended.stderr

"""``inferq batch`` against a server that answers as a Router does, on a network that fails."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from typer.testing import CliRunner

from inferq import client
from inferq.batch import client as batch_client
from inferq.batch import watch as batch_watch
from inferq.batch.client import BatchClient, BatchView
from inferq.batch.input import Shape
from inferq.batch.results import fetch_results
from inferq.batch.submit import Submission, submit
from inferq.batch.views import list_batches, show_errors, show_status
from inferq.batch.watch import Pace, duration, exit_code
from inferq.cli import app
from inferq.client import RequestFailed
from inferq.doctor import DoctorTarget, Level
from inferq.doctor.batches import check_batches
from openai_api.pages import page_of
from queue_schemas import BadRequest
from telemetry.backoff import Backoff
from telemetry.environment import free_port
from tests.support.waiting import eventually

BATCH = "batch_" + "0" * 32
OUTPUT = "file-" + "1" * 32
ERRORS = "file-" + "2" * 32
LINES = [
    {
        "custom_id": f"line-{n}",
        "response": {"status_code": 200, "body": {"choices": [{"message": {"content": f"text {n}"}}]}},
        "error": None,
    }
    for n in range(500)
]
CONTENT = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)


def batch(status: str, completed: int = 0, failed: int = 0, **fields: Any) -> dict[str, Any]:
    counts = {"total": 3, "completed": completed, "failed": failed}
    plain = {"id": BATCH, "object": "batch", "endpoint": "/v1/x", "created_at": 1, "metadata": None}
    return plain | {"status": status, "request_counts": counts} | fields


class FakeRouter:
    """Answers from ``states`` one by one, the last again and again; a number is an error's status. Cuts downloads after
    ``cut_after`` bytes each, and the first ``drops`` creates once they were taken in."""

    def __init__(self) -> None:
        self.listed = batch("in_progress", 1)
        self.states: list[dict[str, Any] | int] = [batch("completed", 3)]
        self.files = {OUTPUT: CONTENT}
        self.cut_after = 10**9
        self.drops = 0
        self.creates: list[tuple[str, dict[str, Any]]] = []
        self.uploads: list[tuple[str, bytes]] = []
        self.ranges: list[str] = []

    def app(self) -> web.Application:
        app = web.Application(client_max_size=10**9)
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}", self._file)
        app.router.add_get("/v1/files/{id}/content", self._content)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", self._list)
        app.router.add_get("/v1/batches/{id}", self._batch)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(text="inferq_up 1")

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        file = form["file"]
        assert isinstance(file, web.FileField) and form["purpose"] == "batch"
        self.uploads.append((file.filename, file.file.read()))
        return web.json_response({"id": "file-in", "bytes": 1})

    async def _create(self, request: web.Request) -> web.Response:
        self.creates.append((request.headers["idempotency-key"], await request.json()))
        if len(self.creates) <= self.drops:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(batch("validating"))

    async def _batch(self, _request: web.Request) -> web.Response:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, int):
            return web.json_response({"error": {"message": "so it is"}}, status=state)
        return web.json_response(state)

    async def _list(self, request: web.Request) -> web.Response:
        after = request.query.get("after")
        one = self.listed | {"id": BATCH[:-1] + ("2" if after else "1")}
        return web.json_response(page_of([one], has_more=not after))

    async def _file(self, request: web.Request) -> web.Response:
        return web.json_response({"id": request.match_info["id"], "bytes": len(self.files[request.match_info["id"]])})

    async def _content(self, request: web.Request) -> web.StreamResponse:
        data = self.files[request.match_info["id"]]
        asked = request.headers.get("range", "")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        rest = data[start:]
        answer = web.StreamResponse(status=206 if asked else 200, headers={"content-length": str(len(rest))})
        await answer.prepare(request)
        await answer.write(rest[: self.cut_after])
        if len(rest) > self.cut_after:
            assert request.transport is not None
            request.transport.close()
        return answer


@pytest.fixture
async def fake(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[FakeRouter, BatchClient]]:
    """A server, and a client of it; pauses between tries are short."""
    monkeypatch.setattr(client, "BACKOFF", Backoff(0.001, 8.0))
    monkeypatch.setattr(batch_client, "BACKOFF", Backoff(0.001, 8.0))
    monkeypatch.setattr(batch_watch, "_MIN_LOOK_S", 0.001)
    monkeypatch.setattr(batch_watch, "_FIRST_WAIT_S", 0.001)
    router = FakeRouter()
    server = TestServer(router.app(), host="127.0.0.1")
    await server.start_server()
    yield router, BatchClient(str(server.make_url("/")))
    await server.close()


def submission(folder: Path) -> Submission:
    path = folder / "prompts.txt"
    path.write_text("one\ntwo\n")
    return Submission(path=path, shape=Shape(model="m"), metadata={"run": "1"})


async def test_submitting_uploads_and_creates_once(
    fake: tuple[FakeRouter, BatchClient], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A create whose answer was lost is asked again under the same key; only the id is on standard output."""
    router, client = fake
    router.drops = 2
    assert await submit(client, submission(tmp_path), watched=False, as_json=False) == 0
    ((name, content),) = router.uploads
    assert name == "prompts.txt.jsonl"
    assert [json.loads(line)["custom_id"] for line in content.splitlines()] == ["line-1", "line-2"]
    assert len(router.creates) == 3 and len({key for key, _ in router.creates}) == 1
    asked = {"input_file_id": "file-in", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert router.creates[-1][1] == asked | {"metadata": {"run": "1"}}
    assert capsys.readouterr().out == f"{BATCH}\n"


async def test_watching_outlasts_a_router_that_is_away(
    fake: tuple[FakeRouter, BatchClient], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the batch's end, which is the exit code; a batch that is gone is not waited for."""
    router, client = fake
    router.states = [batch("validating"), 503, batch("in_progress", 1), batch("completed", 2, 1)]
    assert await submit(client, submission(tmp_path), watched=True, as_json=True) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert "in_progress: 1 of 3 done, 0 failed" in said.err
    router.states = [404]
    with pytest.raises(RequestFailed, match="so it is"):
        await show_status(client, BATCH, watched=True, as_json=False)


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (batch("completed", 3), 0), (batch("completed", 2, 1), 1), (batch("failed"), 1), (batch("expired", 1), 1),
        (batch("cancelled"), 1), (batch("in_progress"), 3), (batch("validating"), 3), (batch("cancelling"), 3),
    ],
)  # fmt: skip
def test_exit_codes_tell_scripts_how_it_ended(state: dict[str, Any], code: int) -> None:
    """0: all is answered, 1: it ended otherwise, 3: it has not."""
    assert exit_code(BatchView.model_validate(state)) == code


async def test_a_download_goes_on_where_it_broke_off(fake: tuple[FakeRouter, BatchClient], tmp_path: Path) -> None:
    """Within one call and over two; what was there stays until all has arrived."""
    router, client = fake
    router.states = [batch("completed", 3, output_file_id=OUTPUT)]
    into = tmp_path / "out.jsonl"
    into.write_bytes(b"older")
    kept = tmp_path / f".out.jsonl.{OUTPUT}.part"
    kept.write_bytes(CONTENT[:100])
    router.cut_after = len(CONTENT) // 3
    assert await fetch_results(client, BATCH, into, texts=False) == 0
    assert into.read_bytes() == CONTENT
    assert router.ranges[0] == "bytes=100-" and len(router.ranges) > 2
    assert not kept.exists()


async def test_a_download_that_never_gets_further_ends(fake: tuple[FakeRouter, BatchClient], tmp_path: Path) -> None:
    """After some tries, with what has arrived kept and the older file untouched."""
    router, client = fake
    router.states = [batch("completed", 3, output_file_id=OUTPUT)]
    router.cut_after = 0
    into = tmp_path / "out.jsonl"
    with pytest.raises(RequestFailed, match="the same command continues"):
        await fetch_results(client, BATCH, into, texts=False)
    assert len(router.ranges) == batch_client.TRIES and not into.exists()
    with pytest.raises(BadRequest, match="cannot be written"):
        await fetch_results(client, BATCH, tmp_path / "none" / "out.jsonl", texts=False)


async def test_texts_are_taken_out_of_answers(fake: tuple[FakeRouter, BatchClient], tmp_path: Path) -> None:
    """With the id of each, whatever pieces the lines come in."""
    router, client = fake
    router.states = [batch("completed", 3, output_file_id=OUTPUT)]
    router.cut_after = 1_000
    into = tmp_path / "texts.jsonl"
    assert await fetch_results(client, BATCH, into, texts=True) == 0
    said = [json.loads(line) for line in into.read_text().splitlines()]
    assert said == [{"custom_id": f"line-{n}", "text": f"text {n}"} for n in range(500)]


@pytest.mark.parametrize(("status", "code"), [("in_progress", 3), ("failed", 1)])
async def test_no_results_is_no_file(
    fake: tuple[FakeRouter, BatchClient], tmp_path: Path, status: str, code: int
) -> None:
    """Not yet, or never: the exit code says which."""
    router, client = fake
    router.states = [batch(status)]
    assert await fetch_results(client, BATCH, tmp_path / "out.jsonl", texts=False) == code
    assert not list(os.scandir(tmp_path))


async def test_errors_of_the_file_and_of_its_lines_are_shown(
    fake: tuple[FakeRouter, BatchClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """With line or id, sentence and code; no terminal obeys what they hold."""
    router, client = fake
    failed: list[Mapping[str, Any]] = [
        {"custom_id": "a", "response": None, "error": {"code": "batch_expired", "message": "too \x1b[31mlate"}},
        {"custom_id": "b", "response": {"status_code": 400, "body": {"error": {"message": "bad"}}}, "error": None},
        {"custom_id": "c", "response": {"status_code": 500, "body": "oh"}, "error": None},
    ]
    router.files[ERRORS] = "\n".join(map(json.dumps, failed)).encode()
    refusals = {"data": [{"code": "invalid_json", "message": "not JSON", "line": 7}]}
    router.states = [batch("completed", 1, 2, errors=refusals, error_file_id=ERRORS)]
    assert await show_errors(client, BATCH, as_json=False) == 1
    assert capsys.readouterr().out.splitlines() == [
        "line 7: not JSON (invalid_json)",
        "a: too \\x1b[31mlate (batch_expired)",
        "b: bad (HTTP 400)",
        'c: "oh" (HTTP 500)',
    ]
    assert await show_errors(client, BATCH, as_json=True) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == failed


async def test_a_list_goes_over_pages(fake: tuple[FakeRouter, BatchClient], capsys: pytest.CaptureFixture[str]) -> None:
    """As far as it was asked to."""
    _, client = fake
    assert await list_batches(client, limit=5, as_json=True) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    await list_batches(client, limit=1, as_json=False)
    said = capsys.readouterr().out
    assert BATCH[:-1] + "1" in said and BATCH[:-1] + "2" not in said


async def test_the_doctor_misses_a_batcher(fake: tuple[FakeRouter, BatchClient], tmp_path: Path) -> None:
    """When a batch has waited for a minute, and not before; a batch that runs is no cause for concern."""
    router, client = fake
    examined = DoctorTarget("", client, tmp_path)
    (finding,) = await check_batches(examined)
    assert finding.level is Level.OK
    router.listed = batch("validating")
    (finding,) = await check_batches(examined)
    assert finding.level is Level.WARNING and "inferq batcher" in finding.fix
    router.listed = batch("validating") | {"created_at": int(time.time())}
    (finding,) = await check_batches(examined)
    assert finding.level is Level.OK


def test_a_pace_is_of_the_last_half_minute() -> None:
    """So that it follows what happens, not what was."""
    pace = Pace()
    assert pace.describe(0, 0, 100) == ""
    for second in range(100):
        pace.saw(second, second * 2 if second < 50 else 100 + (second - 50) * 10)
    assert pace.rate(99, 590) == pytest.approx(10)
    assert pace.describe(99, 590, 1_190) == "10.0/s, 1:00 min left"
    assert [duration(s) for s in (42, 185, 7_800)] == ["42 s", "3:05 min", "2:10 h"]


def test_what_cannot_be_asked_is_one_sentence_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Router, a file that is none, an id that is none, an option that is none."""
    monkeypatch.setenv("INFERQ_ROUTER_URL", f"http://127.0.0.1:{free_port()}")
    runner = CliRunner()
    (tmp_path / "empty.txt").write_text("")
    for arguments in (["status", BATCH], ["submit", str(tmp_path / "empty.txt")], ["status", "../x"]):
        result = runner.invoke(app, ["batch", *arguments])
        assert result.exit_code == 2, result.output
    for arguments in (["--format", "xml"], ["--metadata", "x"], ["--param", "x"]):
        result = runner.invoke(app, ["batch", "submit", "x.txt", *arguments])
        assert isinstance(result.exception, BadRequest)


async def test_ctrl_c_leaves_the_batch_running_and_says_how_to_come_back(
    fake: tuple[FakeRouter, BatchClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is cancelled."""
    router, client = fake
    router.states = [batch("in_progress", 1)]
    watching = asyncio.create_task(show_status(client, BATCH, watched=True, as_json=False))
    await eventually(lambda: "in_progress" in capsys.readouterr().err, "it is watched")
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert f"inferq batch status {BATCH} --watch" in capsys.readouterr().err

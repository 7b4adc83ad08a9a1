"""``inferq jobs``: what it shows, what its exit codes say, and that no answer commands the terminal."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from inferq.client import RequestFailed
from inferq.jobs.client import JobsClient, JobView
from inferq.jobs.views import cancel_job, list_jobs, show_job
from openai_api.pages import page_of

CHAT = {"choices": [{"message": {"content": "Paris \x1b]52;c;cm0gLXJm\x07[red]"}}]}


def job_of(status: str = "completed", number: int = 1, **fields: Any) -> JobView:
    ended = {} if status in ("queued", "in_progress") else {"ended_at": 190}
    return JobView(
        **{"id": f"0-{number:032x}", "status": status, "model": "m", "path": "/v1/completions", "created_at": 100}
        | ended
        | fields
    )


class Fabric(JobsClient):
    """Has some jobs; each look at one shows the next of its states."""

    def __init__(self, *jobs: JobView) -> None:
        super().__init__("http://127.0.0.1:1")
        self.known = list(jobs)
        self.asked: list[tuple[str, int, str]] = []

    async def job(self, job_id: str) -> JobView:
        return self.known.pop(0) if len(self.known) > 1 else self.known[0]

    async def call(self, method: str, path: str, **_: Any) -> bytes:  # type: ignore[override]
        """A page of at most two jobs."""
        query = parse_qs(urlsplit(path).query)
        after, limit, status = query.get("after", [""])[0], int(query["limit"][0]), query.get("status", [""])[0]
        self.asked.append((after, limit, status))
        start = [job.id for job in self.known].index(after) + 1 if after else 0
        data = self.known[start : start + min(limit, 2)]
        more = start + len(data) < len(self.known)
        return json.dumps(page_of([job.model_dump(mode="json") for job in data], has_more=more)).encode()

    async def cancel(self, job_id: str) -> JobView:
        return self.known[0].model_copy(update={"status": "cancelled"})


@pytest.mark.parametrize(
    ("status", "code"),
    [("queued", 3), ("in_progress", 3), ("completed", 0), ("failed", 1), ("cancelled", 1), ("expired", 1)],
)
async def test_the_exit_code_says_how_a_job_stands(status: str, code: int) -> None:
    """As with batches: 0 done, 1 trouble, 3 not ended."""
    assert await show_job(Fabric(job_of(status)), "x", wait=False, as_json=True) == code


async def test_waiting_ends_with_the_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And shows what became of it."""
    monkeypatch.setattr("inferq.jobs.views._MIN_LOOK_S", 0.001)
    fabric = Fabric(job_of("queued"), job_of("in_progress"), job_of("completed"))
    assert await show_job(fabric, "x", wait=True, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "completed"


async def test_an_answer_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    """On standard output alone, so that it can be piped; escape sequences are spelled out."""
    response = {"status_code": 200, "content_type": "application/json", "body": CHAT, "encoding": "json"}
    await show_job(Fabric(job_of(response=response, attempts=2)), "x", wait=False, as_json=False)
    shown = capsys.readouterr()
    assert "Paris" in shown.out
    assert "[red]" in shown.out
    assert "\x1b" not in shown.out + shown.err
    assert "completed: m /v1/completions, after 1:30 min, 2 attempts" in shown.err
    hostile = {"message": "\x1b[2J", "code": "cancelled"}
    await show_job(Fabric(job_of("cancelled", error=hostile)), "x", wait=False, as_json=False)
    assert "\x1b" not in capsys.readouterr().err
    for odd in ({"encoding": "base64", "body": "/w=="}, {"too_large": True}):
        response = {"status_code": 200, "content_type": "audio/wav"} | odd
        await show_job(Fabric(job_of(response=response)), "x", wait=False, as_json=False)
        assert "/output" in capsys.readouterr().err


async def test_jobs_are_listed_over_pages(capsys: pytest.CaptureFixture[str]) -> None:
    """Up to the limit, and only those asked for."""
    fabric = Fabric(*(job_of(number=number) for number in range(5)))
    assert await list_jobs(fabric, limit=3, status="completed", as_json=False) == 0
    listed = capsys.readouterr().out
    assert [f"0-{number:032x}" in listed for number in range(5)] == [True, True, True, False, False]
    assert fabric.asked == [("", 3, "completed"), (f"0-{1:032x}", 1, "completed")]


async def test_cancelling_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """With what became of the job."""
    assert await cancel_job(Fabric(job_of("in_progress")), "x", as_json=False) == 0
    assert "cancelled" in capsys.readouterr().out


async def test_only_an_id_becomes_part_of_a_path() -> None:
    """Nothing is asked for anything else."""
    async with JobsClient("http://127.0.0.1:1") as client:
        for odd in ("../x", "a/b", "", "x?y", "ü"):
            with pytest.raises(RequestFailed, match="not the id of a job"):
                await client.job(odd)

"""Files and batches against a real fleet: with the unmodified ``openai`` SDK, and with `inferq batch`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from openai.types import Batch

from tests.support.batches import BatchStorage, add_batcher
from tests.support.command_line import inferq, inferq_child
from tests.support.fleet import MODEL, Fleet
from tests.support.servers import Server
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

ACME, RIVAL = "sk-of-acme", "sk-of-rival"
CHAT = "/v1/chat/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(module_valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """One fleet for all: two tenants, two workers, a batcher."""
    keys = ",".join(f"{hashlib.sha256(key.encode()).hexdigest()}:{key[6:]}" for key in (ACME, RIVAL))
    async with Fleet(tmp_path_factory.mktemp("fleet"), module_valkey, router={"api_keys": keys}) as fleet:
        fleet.session.headers["authorization"] = f"Bearer {ACME}"
        batcher = add_batcher(fleet, BatchStorage(fleet.folder / ".inferq" / "store"), model_wait_ms=200)
        batcher.process.start()
        await fleet.up(workers=2)
        await batcher.ready()
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    """The SDK as its users make it, but for the retries, which would hide errors."""
    async with AsyncOpenAI(base_url=f"{fleet.router.url}/v1", api_key=ACME, max_retries=0, timeout=30) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rival(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    """The same for another tenant."""
    async with AsyncOpenAI(base_url=f"{fleet.router.url}/v1", api_key=RIVAL, max_retries=0, timeout=30) as client:
        yield client


def line(custom_id: str, url: str = CHAT, **body: Any) -> bytes:
    request = {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": MODEL} | body}
    return json.dumps(request).encode() + b"\n"


def chat(custom_id: str, text: str, **fields: Any) -> bytes:
    return line(custom_id, messages=[{"role": "user", "content": text}], **fields)


async def start(client: AsyncOpenAI, lines: Iterable[bytes], endpoint: str = CHAT, **fields: Any) -> Batch:
    file = await client.files.create(file=("requests.jsonl", b"".join(lines)), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,  # type: ignore[arg-type]  # of type checkers only: any path may stand here
        completion_window="24h",
        **fields,
    )


async def ended(client: AsyncOpenAI, batch_id: str) -> Batch:
    async def look() -> Batch | None:
        batch = await client.batches.retrieve(batch_id)
        return batch if batch.status in ENDED else None

    found = await eventually(look, f"{batch_id} ends", limit_s=30, every_s=0.05)
    assert found is not None
    return found


async def lines_of(client: AsyncOpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of an output or error file by custom_id: each once."""
    assert file_id is not None
    found = [json.loads(text) for text in (await client.files.content(file_id)).text.splitlines()]
    by_id = {one["custom_id"]: one for one in found}
    assert len(by_id) == len(found)
    return by_id


async def test_a_batch_from_upload_to_answers(client: AsyncOpenAI) -> None:
    """Each line is answered once, under its own id; stamps, counts, usage, model and metadata tell of it."""
    asked = {f"ask-{n}": f"text of {n}" for n in range(40)}
    batch = await start(client, (chat(key, text) for key, text in asked.items()), metadata={"run": "first"})
    assert batch.status == "validating"
    batch = await ended(client, batch.id)
    assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (40, 40, 0)
    assert (batch.model, batch.metadata, batch.endpoint) == (MODEL, {"run": "first"}, CHAT)
    assert batch.usage is not None and batch.usage.output_tokens > 40
    stamps = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    known = [stamp for stamp in stamps if stamp is not None]
    assert len(known) == 4 and known == sorted(known)
    assert batch.expires_at == batch.created_at + 86_400
    answers = await lines_of(client, batch.output_file_id)
    said = {key: one["response"]["body"]["choices"][0]["message"]["content"] for key, one in answers.items()}
    assert said == asked
    first = answers["ask-0"]
    assert first["error"] is None and first["response"]["status_code"] == 200 and first["response"]["request_id"]
    output = await client.files.retrieve(batch.output_file_id or "")
    assert output.purpose == "batch_output"


@pytest.mark.parametrize(
    ("endpoint", "body", "key"),
    [
        ("/v1/completions", {"prompt": "once upon"}, "choices"),
        ("/v1/embeddings", {"input": "a text"}, "data"),
        ("/v1/responses", {"input": "a text"}, "output"),
    ],
)
async def test_other_endpoints(client: AsyncOpenAI, endpoint: str, body: dict[str, Any], key: str) -> None:
    """What they answer is in the lines as it is."""
    batch = await start(client, [line("a", endpoint, **body)], endpoint)
    batch = await ended(client, batch.id)
    answers = await lines_of(client, batch.output_file_id)
    assert answers["a"]["response"]["body"][key]


async def test_lines_that_fail_do_not_fail_the_batch(client: AsyncOpenAI) -> None:
    """They stand in the error file with what the engine said, and are counted."""
    refused = chat("bad", "x", sim={"fail": 400})
    batch = await ended(client, (await start(client, [chat("good", "x"), refused])).id)
    assert batch.status == "completed" and batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
    assert list(await lines_of(client, batch.output_file_id)) == ["good"]
    errors = await lines_of(client, batch.error_file_id)
    assert errors["bad"]["response"]["status_code"] == 400


async def test_a_file_that_is_no_batch_fails_it_with_lines(client: AsyncOpenAI) -> None:
    """Each error with its code and line; nothing is run."""
    good = json.loads(chat("a", "x"))
    wrong = {
        2: (b"{not json\n", "invalid_json_line"),
        3: (line("b", "/v1/completions", prompt="x"), "invalid_url"),
        4: (json.dumps(good | {"custom_id": "c", "method": "GET"}).encode() + b"\n", "invalid_method"),
        5: (json.dumps({"url": CHAT, "method": "POST", "body": {}}).encode() + b"\n", "missing_required_parameter"),
        6: (chat("d", "x", stream=True), "unsupported_parameter"),
        7: (chat("e", "x", model="another"), "mismatched_model"),
    }
    files = [
        (wrong, [chat("a", "x"), *(text for text, _ in wrong.values())]),
        ({3: (b"", "duplicate_custom_id")}, [chat("a", "x"), chat("b", "x"), chat("a", "again")]),
        ({2: (b"", "invalid_encoding")}, [chat("a", "x"), '{"custom_id": "ä"}\n'.encode("latin-1")]),
        ({1: (b"", "model_not_found")}, [chat("a", "x", model="none-of-ours")]),
    ]
    batches = [await start(client, lines) for _, lines in files]
    for (expected, _), batch in zip(files, [await ended(client, batch.id) for batch in batches], strict=True):
        assert batch.status == "failed" and batch.failed_at is not None and batch.output_file_id is None
        assert batch.errors is not None and batch.errors.data is not None
        assert {error.line: error.code for error in batch.errors.data} == {n: code for n, (_, code) in expected.items()}
        assert all(error.message for error in batch.errors.data)


async def test_cancelling_keeps_what_is_done(client: AsyncOpenAI) -> None:
    """Cancelling at once, cancelled soon; a second cancel is too late, and not repeated by the SDK."""
    quick = chat("quick", "x")
    slow = [chat(f"slow-{n}", "many words " * 50, sim={"fail": "slow", "delay_ms": 500}) for n in range(60)]
    batch = await start(client, [quick, *slow])

    async def has_begun() -> bool:
        counts = (await client.batches.retrieve(batch.id)).request_counts
        return counts is not None and counts.completed > 0

    await eventually(has_begun, "a line is answered", limit_s=20)
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    done = await ended(client, batch.id)
    assert done.status == "cancelled" and done.cancelling_at is not None and done.cancelled_at is not None
    assert "quick" in await lines_of(client, done.output_file_id)
    with pytest.raises(openai.ConflictError, match="has ended"):
        await client.with_options(max_retries=2).batches.cancel(batch.id)


async def test_lists_are_walked_to_their_end(client: AsyncOpenAI, rival: AsyncOpenAI) -> None:
    """Page after page by the SDK itself, newest first, each batch once; another tenant's list is its own."""
    made = [(await start(rival, [chat("a", "x")], metadata={"n": str(n)})).id for n in range(5)]
    walked = [batch async for batch in rival.batches.list(limit=2)]
    assert {batch.id for batch in walked} == set(made) and len(walked) == 5
    assert [batch.metadata for batch in walked] == sorted((b.metadata for b in walked), key=str, reverse=True)
    assert not set(made) & {batch.id async for batch in client.batches.list(limit=100)}
    page = await rival.batches.list(limit=2)
    assert page.has_next_page()
    await asyncio.gather(*(ended(rival, batch_id) for batch_id in made))


async def test_errors_have_the_sdks_types(client: AsyncOpenAI, rival: AsyncOpenAI, fleet: Fleet) -> None:
    """And the field at fault; what another tenant has is not there."""
    file = await client.files.create(file=("a.jsonl", chat("a", "x")), purpose="batch")
    other = await client.files.create(file=("a.txt", b"text"), purpose="user_data")
    asked: dict[str, Any] = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    for wrong, param in (
        ({"input_file_id": "file-x"}, "input_file_id"),
        ({"input_file_id": other.id}, "input_file_id"),
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.batches.create(**asked | wrong)
        assert refused.value.param == param
    with pytest.raises(openai.BadRequestError, match="no file "):
        await rival.batches.create(**asked)
    batch = await client.batches.create(**asked)
    for call in (rival.batches.retrieve, rival.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            await call(batch.id)
    async with AsyncOpenAI(base_url=f"{fleet.router.url}/v1", api_key="wrong", max_retries=0) as outsider:
        with pytest.raises(openai.AuthenticationError):
            await outsider.batches.list()
    await ended(client, batch.id)


async def test_from_a_table_to_answers_with_ctrl_c_between(fleet: Fleet, tmp_path: Path) -> None:
    """Ctrl-C ends the watching only and says how to come back; the answers are fetched, the exit codes tell."""
    slow = ("-p", 'sim={"fail": "slow", "delay_ms": 60}')
    (tmp_path / "t.csv").write_text("key,text\n" + "".join(f"k{n},word {n}\n" for n in range(80)))
    env = {"INFERQ_ROUTER_URL": fleet.router.url, "INFERQ_API_KEY": ACME}
    submit = ("batch", "submit", "t.csv", "-t", "Say: {text}", "--id-column", "key", "-m", MODEL, *slow, "--watch")
    watching = inferq_child(tmp_path, "submit", *submit, env=env)
    watching.start()
    await eventually(lambda: "in_progress" in watching.log_text(), "the batch runs", limit_s=20)
    watching.send(signal.SIGINT)
    await eventually(lambda: not watching.running, "Ctrl-C ends the watching")
    assert watching.returncode == 130
    (batch_id,) = re.findall(r"inferq batch status (batch_\w+) --watch", watching.log_text())
    at = ("--router-url", fleet.router.url, "--api-key", ACME)
    code, output, _ = await inferq(tmp_path, "batch", "status", batch_id, *at, "--watch", "--json")
    assert (code, json.loads(output)["request_counts"]) == (0, {"total": 80, "completed": 80, "failed": 0})
    code, _, said = await inferq(tmp_path, "batch", "results", batch_id, "-o", "out.jsonl", "--text", *at)
    assert code == 0, said
    texts = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {one["custom_id"]: one["text"] for one in texts} == {f"k{n}": f"Say: word {n}" for n in range(80)}
    code, _, said = await inferq(tmp_path, "batch", "cancel", batch_id, *at)
    assert code == 2 and "has ended" in said

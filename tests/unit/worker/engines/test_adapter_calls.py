"""Loading and unloading adapters, with engines that answer oddly."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from queue_schemas import EngineFailed
from worker.engines import adapter_calls
from worker.engines.adapter_calls import AdapterRefused, AdaptersUnsupported, load_adapter, unload_adapter


@dataclass
class Api:
    """Answers ``POST`` with ``status`` and ``body``, ``GET`` with ``get``; ``models`` is its list afterwards."""

    status: int = 200
    body: bytes = b""
    models: tuple[str, ...] = ("base",)
    get: int = 405
    asked: list[str] = field(default_factory=list)

    async def exchange(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        self.asked.append(f"{method} {path}")
        return (self.status, self.body) if method == "POST" else (self.get, b"")

    async def list_models(self) -> tuple[str, ...]:
        return self.models


async def test_the_engines_list_decides() -> None:
    """Not the status: a load that is said to have failed has not, if the adapter is listed, and the other way round."""
    assert await load_adapter(Api(400, models=("base", "x")), "x", "/x") == ("base", "x")
    assert await unload_adapter(Api(404), "x") == ("base",)
    with pytest.raises(AdapterRefused, match="answered 200 to /v1/load_lora_adapter"):
        await load_adapter(Api(200), "x", "/x")
    with pytest.raises(AdapterRefused, match="answered 500"):
        await unload_adapter(Api(500, models=("base", "x")), "x")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error":{"message":"rank 64 is too large"}}', "rank 64 is too large"),
        (b'{"message":"old format"}', "old format"),
        (b'{"detail":"of FastAPI"}', "of FastAPI"),
        (b'{"error":"a string"}', '{"error":"a string"}'),
        (b"\xff plain", "plain"),
        (b"[1]", r"\[1\]"),
        (b"", "it gave no reason"),
        (b"x" * 10_000, "x{300}$"),
    ],
)
async def test_the_engines_reason_is_told(body: bytes, reason: str) -> None:
    """In whatever form it comes, and not at any length."""
    with pytest.raises(AdapterRefused, match=reason):
        await load_adapter(Api(400, body), "x", "/x")


async def test_a_missing_call_is_told_from_a_missing_adapter() -> None:
    """By what the path answers to another method; that is asked only where it matters."""
    missing = Api(404, get=405)
    with pytest.raises(AdapterRefused) as refused:
        await load_adapter(missing, "x", "/x")
    assert not isinstance(refused.value, AdaptersUnsupported)
    for status in (404, 405, 501):
        with pytest.raises(AdaptersUnsupported, match="--enable-lora"):
            await load_adapter(Api(status, get=404), "x", "/x")
    wrong = Api(400)
    with pytest.raises(AdapterRefused):
        await load_adapter(wrong, "x", "/x")
    assert wrong.asked == ["POST /v1/load_lora_adapter"]


async def test_an_engine_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, as one that is not reached."""
    monkeypatch.setattr(adapter_calls, "CHANGE_TIMEOUT_S", 0.01)

    class Silent(Api):
        async def exchange(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
            await asyncio.Event().wait()
            return 200, b""

    with pytest.raises(EngineFailed, match="did not answer"):
        await load_adapter(Silent(), "x", "/x")

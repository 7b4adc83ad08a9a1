"""Have an engine load or unload a LoRA adapter while it serves, and see in its list that it did.

The calls are vLLM's (its docs, "LoRA Adapters"); SGLang has them on paths of its own (:mod:`.dialects`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Protocol

from queue_schemas import EngineFailed

from .dialects import VLLM, AdapterPaths, Dialect

CHANGE_TIMEOUT_S = 60.0
"""A load takes well under a second where the adapter's files are near."""
_MAX_REASON_LENGTH = 300
_NO_SUCH_CALL = frozenset({404, 405, 501})


class AdapterRefused(EngineFailed):
    """The engine did not load this adapter, or did not unload it: the same call would end the same way."""


class AdaptersUnsupported(AdapterRefused):
    """The engine cannot load adapters while it serves."""


class AdapterApi(Protocol):
    """How these calls reach an engine. Both raise ``EngineFailed``."""

    async def exchange(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the answer."""
        ...

    async def list_models(self) -> tuple[str, ...]:
        """The model ids that it lists."""
        ...


async def load_adapter(api: AdapterApi, name: str, path: str, dialect: Dialect = VLLM) -> tuple[str, ...]:
    """Load the adapter in folder ``path``; the models that the engine lists then, ``name`` among them.

    Raises ``AdapterRefused`` with the engine's reason, ``AdaptersUnsupported`` where there is no such call, and
    ``EngineFailed`` for an engine that is not reached or takes longer than ``CHANGE_TIMEOUT_S``.
    """
    paths = _paths(dialect)
    return await _change(api, paths.load, {"lora_name": name, "lora_path": path}, listed=True, hint=paths.hint)


async def unload_adapter(api: AdapterApi, name: str, dialect: Dialect = VLLM) -> tuple[str, ...]:
    """Unload an adapter; the models that the engine lists then. Raises as :func:`load_adapter` does."""
    paths = _paths(dialect)
    return await _change(api, paths.unload, {"lora_name": name}, listed=False, hint=paths.hint)


def _paths(dialect: Dialect) -> AdapterPaths:
    if dialect.adapter_paths is None:
        raise AdaptersUnsupported(f"{dialect.name} loads no adapters while it serves")
    return dialect.adapter_paths


async def _change(api: AdapterApi, path: str, fields: Mapping[str, str], *, listed: bool, hint: str) -> tuple[str, ...]:
    try:
        async with asyncio.timeout(CHANGE_TIMEOUT_S):
            status, body = await api.exchange("POST", path, json.dumps(fields).encode())
            # Its list decides, not its answer: that an adapter is loaded already is an error to vLLM.
            models = await api.list_models()
            if (fields["lora_name"] in models) is listed:
                return models
            # A path that takes POST alone says 405; one that is not there says 404, as a missing adapter does.
            if status in _NO_SUCH_CALL and (await api.exchange("GET", path))[0] != 405:
                raise AdaptersUnsupported(f"the engine has no {path}: {hint}")
    except TimeoutError as error:
        raise EngineFailed(f"the engine did not answer {path} within {CHANGE_TIMEOUT_S:.0f} s") from error
    raise AdapterRefused(f"the engine answered {status} to {path}: {_reason(body)}")


def _reason(body: bytes) -> str:
    """What an error answer says, for people."""
    try:
        answer = json.loads(body)
        error = answer.get("error", answer)
        reason = str(error.get("message") or error.get("detail") or answer)
    except (ValueError, AttributeError, RecursionError):
        reason = body[: 4 * _MAX_REASON_LENGTH].decode("utf-8", "replace")
    return reason[:_MAX_REASON_LENGTH] or "it gave no reason"

"""Find out which engine a server is, where its own pages say so with certainty.

* ``owned_by`` in ``/v1/models`` is a constant of vLLM, SGLang and llama.cpp.
* TGI names the model as its own owner, and its router in ``/info``.
* Ollama names the model's namespace, ``library`` by default, and has ``/api/version``.

Anything else, such as a proxy that makes up its own list, is no engine that is known. The second pages are asked for
only where the list fits: any other server gets no request for the sake of this.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson

from queue_schemas import EngineFailed

from .llamacpp import LlamacppDialect
from .ollama import OllamaDialect
from .port import Dialect
from .sglang import SglangDialect
from .tgi import TgiDialect
from .vllm import VllmDialect

OPENAI: Dialect = VllmDialect("openai")
"""A server that is not known."""
VLLM: Dialect = VllmDialect()
_OLLAMA, _TGI = OllamaDialect(), TgiDialect()
_OWNERS: Mapping[str, Dialect] = {"vllm": VLLM, "sglang": SglangDialect(), "llamacpp": LlamacppDialect()}
DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (OPENAI, _OLLAMA, _TGI, *_OWNERS.values())}
"""By the names of the setting ``engine_dialect``."""
_TGI_ROUTER = "text-generation-router"
_LIBRARY = "library"

Get = Callable[[str], Awaitable[tuple[int, bytes]]]
"""Status and body of a page. Raises ``EngineFailed`` and ``TimeoutError``."""


async def find_dialect(owners: Mapping[str, object], get: Get) -> Dialect:
    """The dialect of a server whose models have these owners (``owned_by`` by id); ``OPENAI`` where nothing is certain.

    Raises nothing that ``get`` raises: a page that does not come proves nothing.
    """
    named = set(map(str, owners.values()))
    for owner, dialect in _OWNERS.items():
        if named == {owner}:
            return dialect
    if owners and all(owner == model for model, owner in owners.items()):
        found, page, dialect = "router", "/info", _TGI
        expected: str | None = _TGI_ROUTER
    elif owners and all(owner == _LIBRARY or f"/{owner}/" in f"/{model}" for model, owner in owners.items()):
        found, page, dialect, expected = "version", "/api/version", _OLLAMA, None
    else:
        return OPENAI
    said = (await _fields(page, get)).get(found)
    return dialect if type(said) is str and expected in (None, said) else OPENAI


async def _fields(page: str, get: Get) -> dict[str, Any]:
    """The object on a page; an empty one where there is none."""
    try:
        status, body = await get(page)
        fields = orjson.loads(body) if status == 200 else None
    except (EngineFailed, TimeoutError, orjson.JSONDecodeError):
        return {}
    return fields if type(fields) is dict else {}

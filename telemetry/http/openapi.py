"""Complete FastAPI's OpenAPI documents: security schemes, whole references, the error object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from queue_schemas import JOIN_TOKEN_HEADER

Document = dict[str, Any]
Describe = Callable[[Document], None]

BEARER, API_KEY, JOIN_TOKEN, WORKER_KEY = "Bearer", "ApiKey", "JoinToken", "WorkerKey"
API_KEYS: list[dict[str, list[str]]] = [{BEARER: []}, {API_KEY: []}]
WORKERS: list[dict[str, list[str]]] = [{WORKER_KEY: []}, {JOIN_TOKEN: []}]
FLEET: list[dict[str, list[str]]] = [{JOIN_TOKEN: []}]
_SCHEMES = {
    BEARER: {"type": "http", "scheme": "bearer", "description": "An API key"},
    API_KEY: {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same"},
    JOIN_TOKEN: {"type": "apiKey", "in": "header", "name": JOIN_TOKEN_HEADER, "description": "The fleet's join token"},
    WORKER_KEY: {"type": "http", "scheme": "bearer", "description": "A worker's own credential"},
}
_METHODS = frozenset({"get", "put", "post", "delete", "options", "head", "patch", "trace"})


def complete_document(document: Document) -> None:
    """Make ``document`` whole: answers that FastAPI announces by itself and never gives are taken out, and schemas that
    models brought along become components."""
    for _, _, operation in operations(document):
        own = operation.get("responses", {}).get("422", {})
        if "HTTPValidationError" in str(own):
            del operation["responses"]["422"]
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    _lift(document["paths"], schemas)


def add_security(document: Document, rules: Sequence[tuple[str, Sequence[dict[str, list[str]]]]]) -> None:
    """Add the security requirements of each operation: those of the first rule whose prefix fits its path, else none.
    An empty alternative permits calls without credentials."""
    used = set()
    for path, _, operation in operations(document):
        asked = next((list(security) for prefix, security in rules if path.startswith(prefix)), [])
        operation["security"] = asked
        used |= {name for alternative in asked for name in alternative}
    document["components"]["securitySchemes"] = {name: _SCHEMES[name] for name in _SCHEMES if name in used}


def operations(document: Document) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every path, method and operation."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method in _METHODS:
                yield path, method, operation


def _lift(node: Any, schemas: dict[str, Any]) -> None:
    """Move definitions within ``node`` to ``schemas``, and lead references there."""
    if isinstance(node, list):
        for item in node:
            _lift(item, schemas)
    elif isinstance(node, dict):
        for name, schema in node.pop("$defs", {}).items():
            _lift(schema, schemas)
            schemas.setdefault(name, schema)
        reference = node.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/$defs/"):
            node["$ref"] = reference.replace("#/$defs/", "#/components/schemas/")
        for value in node.values():
            _lift(value, schemas)

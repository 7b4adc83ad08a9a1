"""Adds the inference paths and the required credentials to the Router's OpenAPI document."""

from __future__ import annotations

from typing import Any

from openai_api.paths import INFERENCE_PATHS, MULTIPART_PATHS
from queue_schemas import FABRIC_PREFIX
from queue_schemas.worker_protocol.fields import WORKER_PREFIX
from telemetry.http.error_answers import error_responses
from telemetry.http.openapi import API_KEYS, FLEET, WORKERS, Document, add_security

from .http.rules import IDEMPOTENCY_HEADER
from .settings import RouterSettings

_ERRORS = (400, 401, 404, 408, 413, 415, 422, 429, 500, 502, 503, 504)
_SUMMARIES = {
    "/v1/chat/completions": "Chat completion",
    "/v1/completions": "Text completion",
    "/v1/embeddings": "Embeddings",
    "/v1/responses": "Response",
    "/v1/messages": "Message (Anthropic)",
    "/v1/messages/count_tokens": "Tokens of a message (Anthropic)",
    "/v1/audio/transcriptions": "Transcription",
    "/v1/audio/translations": "Translation",
}
_MODEL = {"type": "string", "minLength": 1, "description": "As GET /v1/models lists it"}
_JSON: dict[str, Any] = {
    "type": "object",
    "required": ["model"],
    "additionalProperties": True,
    "properties": {
        "model": _MODEL,
        "stream": {"type": ["boolean", "null"]},
        "priority": {"type": ["integer", "null"], "description": "Lower is earlier"},
        "timeout": {"type": ["number", "null"], "exclusiveMinimum": 0, "description": "Seconds it may take"},
    },
}
_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["model", "file"],
    "properties": {"model": _MODEL, "file": {"type": "string", "format": "binary"}},
}
_HEADERS = (
    (IDEMPOTENCY_HEADER, {"type": "string", "maxLength": 255}, "The same key and request run once"),
    ("x-inferq-deadline-ms", {"type": "integer", "minimum": 1}, "How long the request may take"),
)


def describe(document: Document, settings: RouterSettings) -> None:
    """Add the inference paths to ``document``, and the credentials that each operation requires."""
    known = [*INFERENCE_PATHS, *sorted(settings.paths - set(INFERENCE_PATHS))]
    for path in known:
        document["paths"][path] = {"post": _operation(path)}
    guarded = bool(settings.api_keys or settings.api_keys_file)
    tokened = bool(settings.join_token.get_secret_value())
    users = [*API_KEYS, *([] if guarded else [{}])]
    fleet = [*FLEET, *([] if tokened or guarded else [{}])]
    add_security(
        document,
        [
            *((path, users) for path in known),
            ("/v1/", users),
            (f"{FABRIC_PREFIX}/pools", [*FLEET, *users]),
            (FABRIC_PREFIX, fleet),
            (WORKER_PREFIX, [*WORKERS, *([] if tokened or guarded or settings.worker_credentials_file else [{}])]),
        ],
    )


def _error_schema(path: str) -> dict[str, Any]:
    if not path.startswith("/v1/messages"):
        return {"$ref": "#/components/schemas/ErrorAnswer"}
    detail = {
        "type": "object",
        "required": ["type", "message"],
        "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
    }
    return {
        "type": "object",
        "required": ["type", "error"],
        "properties": {"type": {"const": "error"}, "error": detail},
    }


def _operation(path: str) -> dict[str, Any]:
    form = path in MULTIPART_PATHS
    content = {"multipart/form-data": {"schema": _FORM}} if form else {"application/json": {"schema": _JSON}}
    ways = {"application/json": {"schema": {}}, "text/event-stream": {"schema": {"type": "string"}}}
    errors = {
        str(status): {
            "description": str(said["description"]),
            "content": {"application/json": {"schema": _error_schema(path)}},
        }
        for status, said in error_responses(*_ERRORS).items()
    }
    return {
        "tags": ["inference"],
        "summary": f"{_SUMMARIES.get(path, 'Passed to an engine')}: the fields are the engine's, passed on as they are",
        "operationId": f"infer{path.replace('/', '_').replace('.', '_').replace('-', '_')}",
        "parameters": [
            {"name": name, "in": "header", "required": False, "schema": schema, "description": said}
            for name, schema, said in _HEADERS
        ],
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": {"description": "The engine's answer, or its stream", "content": ways},
            "202": {"description": "A background job (x-inferq-background: true)", "content": ways},
            **errors,
            "499": {**errors["500"], "description": "The job was cancelled"},
        },
    }

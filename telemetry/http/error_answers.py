"""Answers that report an error, in the shape of the path's API: for bare ASGI code, FastAPI handlers and OpenAPI."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Send

from openai_api.errors import Dialect, ErrorDetail, dialect_of, error_body, facts_of, is_final
from queue_schemas import BadRequest, InferqError, MethodNotAllowed, PathNotFound

from .content_coding import ACCEPT_ENCODING
from .methods import allow_header, answered_methods

DEFAULT_RETRY_AFTER_S = 1


class ErrorAnswer(BaseModel):
    """The body of every answer from status 400 up."""

    error: ErrorDetail


def error_answer(
    error: InferqError, dialect: Dialect = Dialect.OPENAI, request_id: str = ""
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, raw headers and body of the answer that tells a client of ``error``, as the ``dialect`` tells it."""
    body = error_body(facts_of(error), dialect, request_id)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status in (429, 503):
        after = DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers.append((b"retry-after", str(after).encode()))
    if is_final(error):
        headers.append((b"x-should-retry", b"false"))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status == 415:
        headers.append((b"accept-encoding", ACCEPT_ENCODING))
    return error.status, headers, body


def error_response(error: InferqError, request: Request | None = None) -> Response:
    """:func:`error_answer` for a FastAPI handler; ``request`` says in which API's shape."""
    dialect = dialect_of(request.url.path) if request is not None else Dialect.OPENAI
    request_id = getattr(request.state, "request_id", "") if request is not None else ""
    status, headers, body = error_answer(error, dialect, request_id)
    response = Response(body, status)
    response.raw_headers = list(headers)
    return response


async def send_error(error: InferqError, send: Send, dialect: Dialect, request_id: str) -> None:
    """:func:`error_answer`, sent as ASGI messages."""
    status, headers, body = error_answer(error, dialect, request_id)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a FastAPI route that may answer with the error object."""
    return {status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase} for status in statuses}


def add_error_handlers(app: FastAPI) -> None:
    """Have ``app`` answer every exception with the error object."""
    app.add_exception_handler(InferqError, _on_inferq_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_inferq_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, InferqError)  # noqa: S101 - what the handler is registered for
    return error_response(error, request)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    param = ".".join(where[1:]) or None
    return error_response(
        BadRequest(f"{' '.join(where[:1])} {param or ''}: {first['msg']}".strip(), param=param), request
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    method, path = request.method, request.url.path
    if isinstance(error.__cause__, InferqError):
        return error_response(
            error.__cause__, request
        )  # raised while the body was read, which FastAPI takes for its own
    if error.status_code == 404:
        return error_response(PathNotFound(f"there is no {path} here; {request.app.state.unknown_path}"), request)
    if error.status_code == 405:
        response = error_response(MethodNotAllowed(f"{path} does not answer {method}"), request)
        response.headers["allow"] = allow_header(answered_methods(request.app, path))
        return response
    if error.status_code < 500:
        refused = BadRequest(str(error.detail))
        response = error_response(refused, request)
        response.status_code = error.status_code
        return response
    return error_response(InferqError(str(error.detail)), request)

"""Logs: one line per event on standard error, with the ids of the request and the job in it.

Modules log through :func:`get_logger`; the lines of libraries (uvicorn, aiohttp, asyncio) go the same way. What is
bound in the running task (:func:`bind`, :func:`bound`) is part of every line it writes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Literal, TextIO, cast

import orjson

from .redaction import redact_text

# structlog draws tracebacks with rich where that can be imported: 3 MB of every process for what no JSON line shows.
_hidden = sys.modules.setdefault("rich", cast(ModuleType, None))
import structlog  # noqa: E402
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger  # noqa: E402

if _hidden is None:
    del sys.modules["rich"]

LogFormat = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]

_CHATTY = ("uvicorn", "uvicorn.error", "aiohttp", "asyncio", "redis", "httpx", "opentelemetry")
"""Libraries whose INFO says what our own lines say better."""
_LOUD = ("python_multipart",)
"""Libraries that warn of what a client did wrong, which the client is told."""
_TRACEBACKS = ("exception", "stack")
"""Facts of many lines, which are our own."""


def configure_logging(
    role: str, level: LogLevel = "info", fmt: LogFormat = "auto", *, stream: TextIO | None = None
) -> None:
    """Set up the process's logs, to be called once by whatever starts a role; a second call replaces the first.

    ``auto`` writes for people where ``stream`` (standard error) is a terminal and JSON elsewhere. A JSON line has the
    keys ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``event``, ``role`` and whatever was bound or given.
    """
    stream = stream or sys.stderr
    console = fmt == "console" or (fmt == "auto" and stream.isatty())
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _add_role(role),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(console, stream)],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, structlog.stdlib.ProcessorFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(threshold)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING) if level != "debug" else logging.DEBUG)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)


def get_logger(name: str) -> FilteringBoundLogger:
    """The logger of module ``name``. Call it as ``log.info("job_claimed", job_id="...")``: an event, then facts."""
    return cast(FilteringBoundLogger, structlog.get_logger(name))


def bind(**facts: str) -> None:
    """Add ``facts`` (``request_id``, ``job_id``, ...) to every later line of the running task and its children."""
    structlog.contextvars.bind_contextvars(**facts)


def bound(**facts: str) -> AbstractContextManager[object]:
    """:func:`bind` for the length of a ``with`` block."""
    return structlog.contextvars.bound_contextvars(**facts)


def bound_facts() -> Mapping[str, Any]:
    """What is bound in the running task."""
    return structlog.contextvars.get_contextvars()


def _add_role(role: str) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("role", role)
        return event

    return add


def _renderers(console: bool, stream: TextIO) -> list[Processor]:
    if console:
        return [
            _without_passwords,
            _without_control_characters,
            structlog.dev.ConsoleRenderer(timestamp_key="time", colors=stream.isatty()),
        ]
    return [
        structlog.processors.format_exc_info,
        _without_passwords,
        structlog.processors.JSONRenderer(serializer=_to_json),
    ]


def _without_passwords(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """URLs may hold them, and stand in the messages of libraries, too."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = redact_text(value)
        elif isinstance(value, (list, tuple)):
            event[name] = [redact_text(part) if isinstance(part, str) else part for part in value]
    return event


def _without_control_characters(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Untrusted input must not reach a terminal as control sequences, nor begin a log line of its own."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable() and name not in _TRACEBACKS:
            event[name] = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in value)
    return event


def _to_json(event: EventDict, **_options: Any) -> str:
    return orjson.dumps(event, default=repr, option=orjson.OPT_NON_STR_KEYS).decode("utf-8", "replace")

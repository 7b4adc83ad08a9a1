"""Log lines: bound ids, levels, formats, untrusted input, passwords."""

import io
import json
import logging
from typing import Literal

import pytest

from telemetry import bind, bound, bound_facts, configure_logging, get_logger


def _lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_line_carries_the_bound_ids() -> None:
    """A JSON line names role, module, event and the ids that were bound in the task."""
    stream = io.StringIO()
    configure_logging("worker", "info", "json", stream=stream)
    bind(request_id="req_1")
    with bound(job_id="0-abc"):
        get_logger("worker.service").info("claimed", slots=3)
    get_logger("worker.service").info("idle")
    claimed, idle = _lines(stream)
    assert claimed.pop("time")
    assert claimed == {
        "level": "info",
        "logger": "worker.service",
        "event": "claimed",
        "role": "worker",
        "request_id": "req_1",
        "job_id": "0-abc",
        "slots": 3,
    }
    assert "job_id" not in idle
    assert bound_facts() == {"request_id": "req_1"}


def test_lines_of_libraries_go_the_same_way() -> None:
    """What a library logs through the standard module comes out as JSON with the bound ids."""
    stream = io.StringIO()
    configure_logging("router", "info", "json", stream=stream)
    bind(request_id="req_2")
    logging.getLogger("uvicorn.error").warning("%s happened", "something")
    logging.getLogger("uvicorn.error").info("chatter")
    (line,) = _lines(stream)
    assert (line["event"], line["logger"], line["request_id"]) == ("something happened", "uvicorn.error", "req_2")


def test_lines_below_the_level_are_not_written() -> None:
    """At level warning an info line is dropped."""
    stream = io.StringIO()
    configure_logging("router", "warning", "json", stream=stream)
    get_logger("x").info("unseen")
    get_logger("x").warning("seen")
    assert [line["event"] for line in _lines(stream)] == ["seen"]


def test_configuring_again_replaces_the_first_setup() -> None:
    """A second set-up writes each line once, to the new stream."""
    first, second = io.StringIO(), io.StringIO()
    configure_logging("router", "info", "json", stream=first)
    configure_logging("router", "info", "json", stream=second)
    get_logger("x").info("once")
    assert first.getvalue() == ""
    assert len(_lines(second)) == 1


def test_exceptions_are_one_line() -> None:
    """A traceback is a field of its line, not lines of its own."""
    stream = io.StringIO()
    configure_logging("router", "info", "json", stream=stream)
    try:
        int("no good")
    except ValueError:
        get_logger("x").exception("failed")
    (line,) = _lines(stream)
    assert "ValueError: invalid literal" in str(line["exception"])


def test_console_lines_are_for_people() -> None:
    """The console format is plain text, without colour codes where there is no terminal."""
    stream = io.StringIO()
    configure_logging("router", "info", "console", stream=stream)
    get_logger("x").info("hello", where="here")
    assert "hello" in stream.getvalue()
    assert "\x1b[" not in stream.getvalue()


def test_untrusted_input_commands_no_terminal() -> None:
    """Control characters in facts are spelled out on a console, and escaped in JSON: one event stays one line."""
    for style in ("console", "json"):
        stream = io.StringIO()
        configure_logging("manager", "info", style, stream=stream)  # type: ignore[arg-type]
        get_logger("manager").info("asked", path="/x\x1b[2J\x9b", error="a\r\nb\u2028c", names=["\x1b]0;"])
        line, rest = stream.getvalue().split("\n")
        assert rest == ""
        assert line.isprintable() or style == "json"
        assert "\x1b" not in line
        assert "2J" in line


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_no_line_has_a_password_of_a_url(fmt: Literal["json", "console"]) -> None:
    """[H24] Addresses are logged as they were given: in facts, lists, the messages of libraries and tracebacks their
    passwords are hidden, and the rest stays."""
    stream = io.StringIO()
    configure_logging("worker", "info", fmt, stream=stream)
    url = "http://user:hid/den@manager:9000"
    get_logger("worker").warning(
        "no_manager", reason=f"{url} does not answer", managers=[url], shown="a@b http://c:1/d"
    )
    logging.getLogger("library").warning("cannot reach redis://:hidden@host:1")
    if fmt == "json":
        get_logger("worker").error("broken", exc_info=ValueError(f"{url} is gone"))
    said = stream.getvalue()
    assert said.count("user:***@manager:9000") == (3 if fmt == "json" else 2)
    assert "redis://:***@host:1" in said
    assert "http://c:1/d" in said
    assert "hid" not in said

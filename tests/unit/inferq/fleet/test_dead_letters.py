"""The commands about dead letters: what outsiders asked is shown, and never obeyed."""

from __future__ import annotations

import base64
import time

import pytest

from inferq.client import RequestFailed
from inferq.fleet.client import FleetClient
from inferq.fleet.dead_letters import list_letters, purge_letters, replay_letters, show_letter
from queue_schemas import DeadLetter, DeadLetterList, DeadRequest, Lane

HOSTILE = "\x1b]52;c;cm0gLXJm\x07 \x9b2J \u202egpj \r\x7f :smile: [red]plain[/red] \u00fc"
SHOWN = "\\x1b]52;c;cm0gLXJm\\x07 \\x9b2J \\u202egpj \\r\\x7f :smile: [red]plain[/red] \u00fc"


def letter_of(at_ms: int = 0) -> DeadRequest:
    return DeadRequest(
        id="0:1-0",
        job_id="0-1",
        at_ms=at_ms,
        model="m",
        tenant="t",
        lane=Lane.BATCH,
        cause=HOSTILE,
        worker="w",
        attempts=3,
        size_bytes=9,
        path="/v1/completions",
        body_base64=base64.b64encode(f"{{\n\t{HOSTILE}".encode()).decode(),
    )


class Fabric(FleetClient):
    """Has one letter."""

    def __init__(self, letter: DeadRequest) -> None:
        super().__init__("http://127.0.0.1:1")
        self.letter = letter
        self.forgotten: list[str] = []

    async def dead_letters(self, after: str, limit: int) -> DeadLetterList:
        return DeadLetterList(letters=[DeadLetter(**self.letter.model_dump(include=set(DeadLetter.model_fields)))])

    async def dead_request(self, letter_id: str) -> DeadRequest:
        return self.letter

    async def purge_dead(self, letter_ids: list[str]) -> int:  # type: ignore[override]
        self.forgotten += letter_ids
        return len(letter_ids)


async def test_a_letter_that_is_gone_does_not_keep_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """Of several, each is asked again that can be, and the rest is told at the end."""

    class Partly(Fabric):
        async def dead_request(self, letter_id: str) -> DeadRequest:
            if letter_id == "gone":
                raise RequestFailed("there is no dead letter 'gone' any more")
            return self.letter

        async def replay(self, path: str, body: bytes, content_type: str) -> bytes:
            return b"answered"

    fabric = Partly(letter_of())
    with pytest.raises(RequestFailed, match="1 of 2"):
        await replay_letters(fabric, ["gone", "0:1-0"])
    assert (capsys.readouterr().out, fabric.forgotten) == ("answered\n", ["0:1-0"])


async def test_a_shown_letter_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences are spelled out; the rest is as it was sent, also what looks like markup or an emoji's name."""
    await show_letter(Fabric(letter_of()), "0:1-0", as_json=False)
    shown = capsys.readouterr().out
    assert f"cause: {SHOWN}\n" in shown
    assert shown.expandtabs().endswith(f"{{\n        {SHOWN}\n")


async def test_listed_letters_command_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Causes come from engines, and engines repeat what they were asked."""
    await list_letters(Fabric(letter_of()), limit=1, as_json=False)
    listed = capsys.readouterr().out
    assert "\\x1b" in listed
    assert all(char.isprintable() or char == "\n" for char in listed)


@pytest.mark.parametrize(("older_than_s", "removed"), [(None, ["0:1-0"]), (60.0, [])])
async def test_all_letters_are_removed_whatever_the_clock_says(older_than_s: float | None, removed: list[str]) -> None:
    """Their times are of the queue's clock, which may be ahead of the one here."""
    fabric = Fabric(letter_of(at_ms=int(time.time() * 1000) + 3_600_000))
    await purge_letters(fabric, [], older_than_s=older_than_s)
    assert fabric.forgotten == removed

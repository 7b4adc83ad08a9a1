"""``inferq chat``: talk to a model, one question or a conversation."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping

from inferq.client import RequestFailed, RouterClient
from inferq.console import err, out, print_json, visible

from .client import Answer, ChatClient, Message


async def chat_once(
    client: ChatClient, model: str, prompt: str, *, system: str, parameters: Mapping[str, float], as_json: bool
) -> None:
    """Ask one question and print the answer as it arrives."""
    async with client:
        model = model or await choose_model(client)
        messages = _opening(system)
        messages.append({"role": "user", "content": prompt})
        answer = await _answer(client, model, messages, parameters, quiet=as_json)
        if as_json:
            print_json(describe(answer))


async def converse(client: ChatClient, model: str, *, system: str, parameters: Mapping[str, float]) -> None:
    """Hold a conversation until the end of input or ``/quit``; ``/clear`` starts over."""
    async with client:
        model = model or await choose_model(client)
        err.print(f"Talking to [bold]{model}[/bold]. /clear starts over, /quit or Ctrl-D ends.")
        messages = _opening(system)
        while True:
            line = await _read_line()
            if line is None or line == "/quit":
                return
            if line == "/clear":
                messages = _opening(system)
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    answer = await _answer(client, model, messages, parameters, quiet=False)
                except RequestFailed as refused:
                    err.print(f"[red]{refused.message}[/red]")
                    messages.pop()
                else:
                    messages.append({"role": "assistant", "content": answer.text})


async def choose_model(client: RouterClient) -> str:
    """The first model that is served, for commands without --model; says so if there are several."""
    models = await client.models()
    if not models:
        raise RequestFailed("no worker serves a model now: start one (`inferq worker`), or name the model with --model")
    if len(models) > 1:
        others = visible(", ".join(models[1:4])) + (", ..." if len(models) > 4 else "")
        err.print(f"Using {visible(models[0])}, the first of {len(models)} models (also: {others}).", markup=False)
    return models[0]


def describe(answer: Answer) -> dict[str, object]:
    """An answer as JSON; times in seconds."""
    return {
        "text": answer.text,
        "model": answer.model,
        "request_id": answer.request_id,
        "finish_reason": answer.finish_reason,
        "first_token_s": round(answer.first_s, 4),
        "total_s": round(answer.total_s, 4),
        "usage": answer.usage,
    }


async def _answer(
    client: ChatClient, model: str, messages: Iterable[Message], parameters: Mapping[str, float], *, quiet: bool
) -> Answer:
    answer = Answer()
    async for piece in client.stream_chat(answer, model, list(messages), **parameters):
        if not quiet:
            out.print(piece, end="", markup=False)
    if not quiet:
        out.print()
    return answer


async def _read_line() -> str | None:
    """The next line that was typed; None at the end of input."""

    def read() -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None

    return await asyncio.to_thread(read)


def _opening(system: str) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []

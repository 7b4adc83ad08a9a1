"""Converts the input of a Responses request into the messages of a chat.

Leading system and developer messages become one system message, as chat templates expect at most one, at the beginning.
Consecutive function calls become one assistant message. Earlier reasoning is left out, as templates leave it out too.
"""

from __future__ import annotations

from typing import Any

from .json_fields import Json, optional_text, text_of, wrong

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_ADVICE = {
    "item_reference": "refers to an item kept elsewhere: send the item itself",
    "compaction": "is of a type that only its maker can read: send the items that it stands for",
}


def chat_messages(instructions: str | None, given: Any) -> list[Json]:
    """The messages for ``instructions`` and the ``input`` given. Raises ``BadRequest``."""
    messages: list[Json] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for place, item in enumerate(input_items(given)):
        _add(messages, item, f"input[{place}].")
    if not any(message["role"] != "system" for message in messages):
        raise wrong("input", "holds nothing to answer: send text, or a message of a user")
    return messages


def input_items(given: Any) -> list[Json]:
    """``input`` as items; text is a user's message. Raises ``BadRequest`` for what is neither text nor items."""
    if type(given) is str:
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    if type(given) is not list or not given:
        raise wrong("input", "must be text or a list of items" if given is not None else "is missing; it must be text")
    for place, item in enumerate(given):
        if type(item) is not dict:
            raise wrong(f"input[{place}]", "must be an object: an item such as a message")
    return given


def _add(messages: list[Json], item: Json, at: str) -> None:
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "message":
        _add_message(messages, item, at)
    elif kind == "function_call":
        call = {"name": text_of(item, "name", at), "arguments": text_of(item, "arguments", at)}
        last = messages[-1] if messages else {}
        if last.get("role") != "assistant":
            last = {"role": "assistant", "content": None}
            messages.append(last)
        last.setdefault("tool_calls", []).append(
            {"id": text_of(item, "call_id", at), "type": "function", "function": call}
        )
    elif kind == "function_call_output":
        output = _content(item.get("output"), f"{at}output", {"input_text": _text})
        messages.append({"role": "tool", "tool_call_id": text_of(item, "call_id", at), "content": output})
    elif kind != "reasoning":
        advice = _ADVICE.get(
            str(kind), "is not one of message, function_call, function_call_output, reasoning: leave the item out"
        )
        raise wrong(f"{at}type", advice)


def _add_message(messages: list[Json], item: Json, at: str) -> None:
    role = item.get("role")
    if type(role) is not str or role not in _ROLES:
        raise wrong(f"{at}role", "must be one of user, assistant, system, developer")
    content = _content(item.get("content"), f"{at}content", _OUTPUT_PARTS if role == "assistant" else _INPUT_PARTS)
    if role == "assistant" and type(content) is list:
        content = "".join(part["text"] for part in content)
    last = messages[-1] if messages else {}
    so_far = all(message["role"] == "system" for message in messages)
    if messages and so_far and _ROLES[role] == "system" and type(content) is str and type(last["content"]) is str:
        last["content"] += f"\n\n{content}"
    else:
        messages.append({"role": _ROLES[role], "content": content})


def _content(given: Any, at: str, known: dict[str, Any]) -> str | list[Json]:
    """Text, or the parts of a chat message; a single text is given as such."""
    if type(given) is str:
        return given
    if type(given) is not list:
        raise wrong(at, "must be text or a list of parts")
    parts = []
    for place, part in enumerate(given):
        where = f"{at}[{place}]"
        if type(part) is not dict:
            raise wrong(where, "must be an object: a part such as input_text")
        read = known.get(str(part.get("type")))
        if read is None:
            raise wrong(f"{where}.type", f"is not one of {', '.join(known)}: send the part as one of these")
        parts.append(read(part, f"{where}."))
    if len(parts) == 1 and parts[0]["type"] == "text":
        return str(parts[0]["text"])
    return parts


def _text(part: Json, at: str) -> Json:
    return {"type": "text", "text": text_of(part, "text", at)}


def _refusal(part: Json, at: str) -> Json:
    return {"type": "text", "text": text_of(part, "refusal", at)}


def _image(part: Json, at: str) -> Json:
    if part.get("file_id") is not None:
        raise wrong(f"{at}file_id", "cannot be read here: send the image as image_url, which may be a data: URL")
    detail = optional_text(part, "detail", at)
    return {
        "type": "image_url",
        "image_url": {"url": text_of(part, "image_url", at)} | ({"detail": detail} if detail else {}),
    }


def _audio(part: Json, at: str) -> Json:
    audio = part.get("input_audio")
    if type(audio) is not dict:
        raise wrong(f"{at}input_audio", "must be an object with data and format")
    sound = {name: text_of(audio, name, f"{at}input_audio.") for name in ("data", "format")}
    return {"type": "input_audio", "input_audio": sound}


_INPUT_PARTS = {"input_text": _text, "input_image": _image, "input_audio": _audio}
_OUTPUT_PARTS = {"output_text": _text, "refusal": _refusal, "input_text": _text}

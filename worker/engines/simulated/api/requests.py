"""Read requests as vLLM's server does: the same parameters, refused with the same error objects."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import orjson

from ..failures import Failure, parse_order
from ..settings import Mode, SimulationSettings
from ..tokens import CHARS_PER_TOKEN, VOCABULARY, count_tokens, decode_foreign_tokens, decode_tokens
from .logprobs import chat_logprobs, completion_logprobs
from .refusal import Fields, RefusedRequest, refuse_unsimulated
from .structured import Shape, shape_of
from .tools import Tool, chat_tools, thinking, tool_to_call

DIGEST_CHARS = 16
MAX_CHOICES = 128
MAX_INPUTS = 2048
_DIGEST = re.compile(r"(?=([0-9a-f]{16}))[0-9a-f]")


Api = Literal["chat", "text", "responses", "messages"]


@dataclass(frozen=True, slots=True)
class Generate:
    """A chat or text completion, a response or a message. ``limit`` is in tokens; ``prompt`` is the whole text the
    engine would read, but for ``prefix``: the beginning of the answer, behind which it is to go on. ``call`` is the
    tool that it calls, if it does; ``thoughts`` is how many tokens it thinks before it speaks; ``shape`` is what its
    text must be;
    ``logprobs`` how many alternatives are told beside each token, None for no log probabilities. ``others`` are the
    further prompts of the same completion. ``fields`` are those of the request that its answer repeats."""

    api: Api
    model: str
    prompt: str
    last_user: str
    prompt_tokens: int
    stream: bool
    include_usage: bool
    limit: int
    choices: int
    stop: tuple[str, ...]
    keep_stop: bool
    ignore_end: bool
    echo: bool
    seed: int
    failure: Failure | None
    prefix: str
    call: Tool | None = None
    thoughts: int = 0
    shape: Shape | None = None
    logprobs: int | None = None
    others: tuple[Generate, ...] = ()
    fields: Fields = field(default_factory=dict)

    @property
    def prompts(self) -> tuple[Generate, ...]:
        """Every prompt with its parameters, this one first."""
        return (self, *self.others)

    @property
    def chat(self) -> bool:
        return self.api == "chat"


@dataclass(frozen=True, slots=True)
class Embed:
    """A request for embeddings: one vector of ``dimensions`` per input."""

    model: str
    inputs: tuple[str, ...]
    dimensions: int
    base64: bool
    failure: Failure | None


def parse_object(body: bytes) -> Fields:
    """The JSON object in ``body``."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RefusedRequest(f"JSON decode error: {error}") from error
    if not isinstance(fields, dict):
        raise RefusedRequest("Input should be a valid dictionary: the body is a JSON object")
    return fields


def parse_chat(body: bytes, settings: SimulationSettings) -> Generate:
    """``POST /v1/chat/completions``."""
    fields = parse_object(body)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedRequest("messages: Input should be a list of at least one message", param="messages")
    parts, last_user, prefix = [], "", ""
    goes_on = as_bool(fields, "continue_final_message")
    if goes_on and as_bool(fields, "add_generation_prompt", default=True):
        raise RefusedRequest("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    for place, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RefusedRequest("messages: each message is an object with a role", param="messages")
        text = _content(message.get("content"))
        if message["role"] == "user":
            last_user = text
        if goes_on and place == len(messages):
            prefix = text.strip() if settings.template_trims else text
            continue
        parts.append(f"<|{message['role']}|>{text}\n")
    limit = optional_int(fields, "max_completion_tokens", least=1)
    if limit is None:
        limit = optional_int(fields, "max_tokens", least=1)
    request = generate(fields, settings, "".join(parts), last_user, limit, api="chat", prefix=prefix)
    asked = last_user if messages[-1]["role"] == "user" else ""
    called = tool_to_call(chat_tools(fields), fields.get("tool_choice"), asked)
    return replace(request, call=called, thoughts=thinking(fields), logprobs=chat_logprobs(fields))


def parse_completion(body: bytes, settings: SimulationSettings) -> Generate:
    """``POST /v1/completions``: a prompt, as text or as token ids, or a list of prompts."""
    fields = parse_object(body)
    prompt = fields.get("prompt")
    several = isinstance(prompt, list) and not (prompt and all(type(item) is int for item in prompt))
    prompts = prompt if isinstance(prompt, list) and several else [prompt]
    choices = len(prompts) * (optional_int(fields, "n", least=1) or 1)
    if not prompts or choices > MAX_CHOICES:
        raise RefusedRequest(f"prompt: 1 to {MAX_CHOICES} choices, n for each prompt", param="prompt")
    limit = optional_int(fields, "max_tokens", least=0 if as_bool(fields, "echo") else 1)
    limit, logprobs = 16 if limit is None else limit, completion_logprobs(fields)
    made = []
    for one in prompts:
        asked, prefix = _asked_and_said(_text_of(one, "prompt"), settings.mode)
        request = generate(fields, settings, asked, asked, limit, api="text", prefix=prefix)
        made.append(replace(request, logprobs=logprobs))
    return replace(made[0], others=tuple(made[1:]))


def parse_embeddings(body: bytes, settings: SimulationSettings) -> Embed:
    """``POST /v1/embeddings``: ``input`` is a text, a list of token ids, or a list of either."""
    fields = parse_object(body)
    value = fields.get("input")
    several = isinstance(value, list) and not (value and all(type(item) is int for item in value))
    items = value if isinstance(value, list) and several else [value]
    if not items or len(items) > MAX_INPUTS:
        raise RefusedRequest(f"input: 1 to {MAX_INPUTS} inputs", param="input")
    form = fields.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise RefusedRequest("encoding_format: Input should be 'float' or 'base64'", param="encoding_format")
    dimensions = optional_int(fields, "dimensions", least=1)
    if dimensions is not None and dimensions > settings.embedding_dimensions:
        raise RefusedRequest(
            f"dimensions must be at most {settings.embedding_dimensions} for this model", param="dimensions"
        )
    return Embed(
        model_of(fields, settings),
        tuple(_text_of(item, "input") for item in items),
        dimensions or settings.embedding_dimensions,
        form == "base64",
        _failure(fields),
    )


def parse_tokenize(body: bytes, settings: SimulationSettings) -> tuple[str, str]:
    """``POST /tokenize``: the text of a ``prompt`` or of ``messages``, and of the message that is to go on."""
    fields = parse_object(body)
    model_of(fields, settings)
    if "messages" in fields:
        chat = parse_chat(body, settings)
        return chat.prompt, chat.prefix
    return _asked_and_said(_text_of(fields.get("prompt"), "prompt"), settings.mode)


def parse_detokenize(body: bytes, settings: SimulationSettings) -> str:
    """``POST /detokenize``: the text of ``tokens``."""
    fields = parse_object(body)
    model_of(fields, settings)
    tokens = fields.get("tokens")
    if not isinstance(tokens, list):
        raise RefusedRequest("tokens: Input should be a valid list", param="tokens")
    return _text_of(tokens, "tokens") if tokens else ""


def model_of(fields: Fields, settings: SimulationSettings) -> str:
    """The model a request names; without one, the first."""
    model = fields.get("model")
    if model is None:
        return settings.models[0]
    if not isinstance(model, str):
        raise RefusedRequest("model: Input should be a valid string", param="model")
    if model not in settings.models and model not in settings.adapters:
        raise RefusedRequest(f"The model `{model}` does not exist.", param="model", status=404)
    return model


def generate(
    fields: Fields,
    settings: SimulationSettings,
    prompt: str,
    last_user: str,
    limit: int | None,
    *,
    api: Api,
    prefix: str = "",
) -> Generate:
    """What is asked for behind ``prompt``, with the parameters that all of them know."""
    model = model_of(fields, settings)
    refuse_unsimulated(fields, api)
    prompt_tokens = count_tokens(prompt) + count_tokens(prefix)
    room = settings.max_model_len - prompt_tokens
    if room < (limit or 1):
        raise RefusedRequest(
            f"This model's maximum context length is {settings.max_model_len} tokens. However, you requested"
            f" {limit or 1} output tokens and your prompt contains {prompt_tokens} input tokens.",
            param="max_tokens" if limit else "input_tokens",
        )
    stream = as_bool(fields, "stream")
    for name, most in (("temperature", 100.0), ("top_p", 1.0)):
        _number(fields, name, most)
    choices = optional_int(fields, "n", least=1)
    if choices is not None and choices > MAX_CHOICES:
        raise RefusedRequest(f"n must be at most {MAX_CHOICES}", param="n")
    return Generate(
        api=api,
        model=model,
        prompt=prompt,
        last_user=last_user,
        prompt_tokens=prompt_tokens,
        stream=stream,
        include_usage=api in ("chat", "text") and _include_usage(fields, stream=stream),
        limit=room if limit is None else limit,
        choices=choices or 1,
        stop=_stop(fields.get("stop")),
        keep_stop=as_bool(fields, "include_stop_str_in_output"),
        ignore_end=as_bool(fields, "ignore_eos"),
        echo=api == "text" and as_bool(fields, "echo"),
        seed=optional_int(fields, "seed") or 0,
        failure=_failure(fields),
        prefix=prefix,
        shape=shape_of(fields, prompt),
    )


def _asked_and_said(text: str, mode: Mode) -> tuple[str, str]:
    """A completion's prompt, and what stands behind it of its own answer: a prompt that was made longer by a part of
    the answer is to be gone on with, as a language model would."""
    if mode == "echo":
        places = range(max(len(text) // 2, 1), len(text) - CHARS_PER_TOKEN + 1)
        found = next((at for at in places if text.startswith(text[at:])), len(text))
        return text[:found], text[found:]
    for match in _DIGEST.finditer(text):
        if match.group(1) == prompt_digest(text[: match.start()]):
            return text[: match.start()], text[match.start() :]
    for said in range(DIGEST_CHARS - CHARS_PER_TOKEN, 0, -CHARS_PER_TOKEN):
        if said < len(text) and text[-said:] == prompt_digest(text[:-said])[:said]:
            return text[:-said], text[-said:]
    return text, ""


def prompt_digest(prompt: str) -> str:
    """What a text answer begins with: 16 hexadecimal digits that only this prompt gives."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_CHARS // 2).hexdigest()


def _failure(fields: Fields) -> Failure | None:
    if "sim" not in fields:
        return None
    try:
        return parse_order(fields["sim"])
    except ValueError as error:
        raise RefusedRequest(str(error), param="sim") from error


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        # Parts that are not text (images, audio) count as their type.
        texts = [part.get("text") if part.get("type") == "text" else f"<|{part.get('type')}|>" for part in content]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(texts)
    raise RefusedRequest("messages: content should be a string or a list of parts", param="messages")


def _text_of(value: Any, param: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        try:
            return decode_tokens(value) if param == "tokens" else decode_foreign_tokens(value)
        except ValueError as error:
            raise RefusedRequest(f"{error}; ids are below {VOCABULARY}", param=param) from error
    raise RefusedRequest(f"{param}: Input should be a valid string or a list of token ids", param=param)


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise RefusedRequest("stop: Input should be a valid string or a list of strings", param="stop")
    if "" in stops:
        raise RefusedRequest("stop cannot contain an empty string.", param="stop")
    return tuple(stops)


def _include_usage(fields: Fields, *, stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise RefusedRequest("stream_options: Input should be a valid dictionary", param="stream_options")
    if not stream:
        raise RefusedRequest("Stream options can only be defined when `stream=True`.", param="stream_options")
    return as_bool(options, "include_usage")


def as_bool(fields: Fields, name: str, *, default: bool = False) -> bool:
    """A field that is true or false."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RefusedRequest(f"{name}: Input should be a valid boolean", param=name)
    return value


def optional_int(fields: Fields, name: str, *, least: int | None = None) -> int | None:
    """A field that is a whole number, ``least`` or more."""
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int:
        raise RefusedRequest(f"{name}: Input should be a valid integer", param=name)
    if least is not None and value < least:
        raise RefusedRequest(f"{name} must be at least {least}, got {value}.", param=name)
    return value


def _number(fields: Fields, name: str, most: float) -> None:
    value = fields.get(name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RefusedRequest(f"{name}: Input should be a valid number", param=name)
    if not 0 <= value <= most:
        raise RefusedRequest(f"{name} must be between 0 and {most:g}, got {value}.", param=name)

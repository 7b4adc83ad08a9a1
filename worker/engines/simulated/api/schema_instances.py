"""Make a text that satisfies a constraint: a JSON schema, a regular expression or a grammar.

``llguidance``, which vLLM uses for structured outputs, says which bytes may follow; this module picks one of them,
drawn by a key, so that the same key and constraint give the same text. JSON is then checked against the schema with
``jsonschema``. Import this module only when a request needs it: both libraries take a moment to load.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jsonschema.exceptions
import jsonschema.validators
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from
from referencing import Registry
from referencing.exceptions import Unresolvable

from .byte_choice import END, JsonChoice, TextChoice

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_TEXT_BYTES = 32 * 1024
MAX_CPU_S = 1.0
"""Processor time for one request, over all attempts: a bound on what a contradictory or huge constraint costs."""
ATTEMPTS = 256
NARROW_ATTEMPTS = 9
_EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "date": ("2024-02-29", "2025-06-30"),
    "date-time": ("2024-02-29T12:30:00Z", "2025-06-30T08:15:00Z"),
    "time": ("12:30:00Z", "08:15:00Z"),
    "duration": ("P1D", "PT30M"),
    "email": ("user@example.com", "reader@example.org"),
    "hostname": ("example.com", "www.example.org"),
    "ipv4": ("192.0.2.1", "198.51.100.7"),
    "ipv6": ("2001:db8::1", "2001:db8::7"),
    "uri": ("https://example.com/", "https://example.org/page"),
    "uuid": ("6f1f7a3e-3b8e-4a55-9d2c-0c7f3d1b2a44", "0d9f6c52-7a41-4c0e-8f6b-5e2a9c4d1b30"),
}


class CannotSatisfy(Exception):
    """No text that satisfies the constraint was found; the message says why."""


class _ByteVocabulary:
    """A tokenizer whose tokens are the 256 bytes and an end."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"\xff<|end|>")
    special_token_ids = (END,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


_TOKENIZER = LLTokenizer(TokenizerWrapper(_ByteVocabulary()), slices=[])
_LIMITS = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=100_000, verbose_errors=False)
_COMPACT: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": True,
}


def json_instance(schema_text: str, key: str) -> str:
    """An instance of the JSON schema ``schema_text``, as JSON. Raises :class:`CannotSatisfy`."""
    schema = json.loads(schema_text)
    validator = _validator(schema)
    until, reason = time.thread_time() + MAX_CPU_S, "the schema allows no value, or its keywords exclude each other"
    for attempt in range(ATTEMPTS):
        # Narrower schemas first: their instances are easier to read. Each instance is checked against the whole one.
        matcher, fault = _json_matcher(schema_text, attempt % 3)
        if matcher is None:
            reason = fault
            continue
        draw = random.Random(f"{attempt}\0{key}")
        text = _drawn(matcher.deep_copy(), JsonChoice(draw, wide=attempt >= NARROW_ATTEMPTS).choose, until)
        if time.thread_time() > until:
            reason = f"none came within {MAX_CPU_S:g} s of work"
            break
        if text is None:
            continue
        try:
            validator.validate(json.loads(text))
        except jsonschema.exceptions.ValidationError as error:
            reason = error.message
        except Unresolvable as error:
            raise CannotSatisfy(f"the schema refers to {error.ref}, which is not in it") from error
        except (ValueError, RecursionError, re.error) as error:
            reason = str(error)
        else:
            return text
    raise CannotSatisfy(f"no instance of the schema was found: {reason[:300]}")


def matching_text(kind: str, constraint: str, key: str) -> str:
    """A text that matches a ``regex`` or ``grammar``. Raises :class:`CannotSatisfy`."""
    matcher, fault = _matcher(kind, constraint)
    if matcher is None:
        raise CannotSatisfy(fault)
    until = time.thread_time() + MAX_CPU_S
    for attempt in range(ATTEMPTS):
        draw = random.Random(f"{attempt}\0{key}")
        text = _drawn(matcher.deep_copy(), TextChoice(draw).choose, until)
        if text is not None:
            return text
    raise CannotSatisfy(f"no text of at most {MAX_TEXT_BYTES} bytes that matches it was found")


def _validator(schema: Any) -> Any:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except (jsonschema.exceptions.SchemaError, RecursionError) as error:
        where = "/".join(str(part) for part in getattr(error, "path", ()))
        at = f" at {where}" if where else ""
        raise CannotSatisfy(f"it is not a valid JSON schema{at}: {getattr(error, 'message', error)}") from error
    # A registry of its own: nothing outside the schema is ever fetched.
    return kind(schema, registry=Registry(), format_checker=kind.FORMAT_CHECKER)


@lru_cache(maxsize=256)
def _json_matcher(schema_text: str, width: int) -> tuple[LLMatcher | None, str]:
    """What follows ``schema_text``: narrowed twice (``width`` 0), only with examples of formats (1), as it is (2)."""
    schema = json.loads(schema_text)
    if width < 2:
        schema = _narrowed(schema, closed=width == 0)
    return _built(LLMatcher.grammar_from_json_schema(schema, overrides=_COMPACT))


@lru_cache(maxsize=256)
def _matcher(kind: str, constraint: str) -> tuple[LLMatcher | None, str]:
    try:
        grammar = LLMatcher.grammar_from_regex(constraint) if kind == "regex" else grammar_from("grammar", constraint)
    except ValueError as error:
        return None, str(error)
    return _built(grammar)


def _built(grammar: str) -> tuple[LLMatcher | None, str]:
    matcher = LLMatcher(_TOKENIZER, grammar, log_level=0, limits=_LIMITS)
    return (None, matcher.get_error().partition("\n")[0]) if matcher.is_error() else (matcher, "")


def _narrowed(schema: Any, *, closed: bool) -> Any:
    """``schema`` with examples for the formats of strings and, if ``closed``, no properties beyond those it names."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for name, value in schema.items():
        if name in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, dict):
            made[name] = {key: _narrowed(part, closed=closed) for key, part in value.items()}
        elif name in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            made[name] = [_narrowed(part, closed=closed) for part in value]
        elif name in ("items", "additionalProperties"):
            made[name] = _narrowed(value, closed=closed)
    examples = _EXAMPLES.get(str(made.get("format")))
    if examples and made.get("type") == "string" and "enum" not in made and "const" not in made:
        made["enum"] = list(examples)
    names = made.get("propertyNames")
    if isinstance(names, dict) and isinstance(names.get("enum"), list) and "properties" not in made:
        value = made.get("additionalProperties", {})
        made["properties"] = {str(name): value for name in names["enum"][:3]}
        made["additionalProperties"] = False
    if closed and isinstance(made.get("properties"), dict) and made.get("additionalProperties", True) is True:
        made["additionalProperties"] = False
    return made


def _drawn(matcher: LLMatcher, choose: Callable[[list[int], bool], int], until: float) -> str | None:
    """A text that ``matcher`` accepts, byte for byte as ``choose`` picks it; None if it comes to no end."""
    text = bytearray()
    while time.thread_time() < until:
        accepting = matcher.is_accepting()
        allowed = [byte for byte in _bits(matcher.compute_bitmask()) if byte != END]
        if not allowed:
            return _decoded(text) if accepting else None
        if len(text) >= MAX_TEXT_BYTES:
            return None
        picked = choose(allowed, accepting)
        if picked == END:
            return _decoded(text)
        if not matcher.consume_token(picked):
            return None
        text.append(picked)
    return None


def _decoded(text: bytearray) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def _bits(mask: bytes) -> list[int]:
    number = int.from_bytes(mask, "little")
    found = []
    while number:
        lowest = number & -number
        found.append(lowest.bit_length() - 1)
        number ^= lowest
    return [bit for bit in found if bit <= END]
